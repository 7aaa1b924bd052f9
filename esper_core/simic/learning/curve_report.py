"""Learning curves of a training as one self-contained HTML file: inline SVG, no script, nothing fetched."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 560, 200, 54, 22
_COLOURS: Final = ("#1f7a4a", "#3f8efc", "#e07b39", "#7b5cd6", "#c9a227", "#c43d3d", "#b04ac9", "#56645c")
_STYLE: Final = """
:root { color-scheme: light dark; --ink: #16211b; --soft: #56645c; --line: #dce3de;
  --ground: #f5f7f5; --panel: #fdfefd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5ece8; --soft: #a0aea6; --line: #2b3530; --ground: #0f1412; --panel: #151b18; } }
body { margin: 0 auto; max-width: 1240px; padding: 24px; background: var(--ground); color: var(--ink);
  font: 16px/1.5 ui-sans-serif, system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 30px; letter-spacing: -.02em; margin: 0 0 4px; } h2 { font-size: 17px; margin: 0; }
p, figcaption { color: var(--soft); font-size: 14px; margin: 2px 0 10px; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 14px; }
figure { margin: 0; padding: 12px 16px; background: var(--panel); border: 1px solid var(--line); border-radius: 10px; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--soft); } svg .axis { stroke: var(--line); }
ul { list-style: none; padding: 0; margin: 6px 0 0; display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; }
li i { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle; }
table { border-collapse: collapse; font-size: 14px; margin: 18px 0; }
td { padding: 2px 18px 2px 0; vertical-align: top; }
td:first-child { color: var(--soft); }
"""


def write_curve_report(path: str | Path, lineage: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Path:
    """Write the report atomically.

    Args:
        lineage: of the agent or adapter. records: the lines of `curves.jsonl`.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(render_curves(lineage, records), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def render_curves(lineage: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    worlds = sorted({name for r in records for name in r["worlds"]})
    heads = sorted({n for r in records for n in r["update"] if n.startswith("entropy_")})
    operations = sorted({name for r in records for name in r["commands"]})

    def column(*keys: str) -> list[float]:
        return [_at(r, keys) for r in records]

    figures = [
        ("Return", "mean over the environments of an iteration, and by world (nats, rent paid)",
         {"all": column("return"), **{w: column("worlds", w) for w in worlds}}),
        ("What growing gained", "over the WAIT twin at the end of an episode, before rent",
         {"loss (nats)": column("loss_gain"), "accuracy": column("accuracy_gain")}),
        ("What it weighs", "parameters of seeds over the host's at the end",
         {"params ratio": column("params_ratio")}),
        ("Commands", "carried out in an episode, by operation", {o: column("commands", o) for o in operations}),
        ("Entropy by head", "nats, over the decisions in which the head had a choice",
         {h.removeprefix("entropy_"): column("update", h) for h in heads}),
        ("Distance", "KL of the new policy from the old, and the share of ratios that were clipped",
         {"KL": column("update", "kl_worst"), "clipped": column("update", "clipped")}),
        ("Value loss", "squared error of the value estimate, in scaled rewards",
         {"value loss": column("update", "value_loss")}),
        ("Likelihood of the teacher", "mean log-likelihood of a demonstrated decision",
         {"log likelihood": column("update", "log_likelihood")}),
    ]  # fmt: skip
    drawn = "\n".join(_figure(*f) for f in figures if any(math.isfinite(v) for s in f[2].values() for v in s))
    told = "".join(f"<tr><td>{html.escape(k.replace('_', ' '))}</td><td>{html.escape(_text(v))}</td></tr>"
                   for k, v in lineage.items() if v is not None)  # fmt: skip
    title = html.escape(f"{lineage.get('curriculum', '')}, seed {lineage.get('seed', 0)}")
    taught = sum(r["phase"] == "imitation" for r in records)
    note = f"; the first {taught} imitate a teacher, and their returns are the teacher's" if taught else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title} · Tamiyo</title><style>{_STYLE}</style></head><body>"
        f"<h1>Tamiyo: {title}</h1><p>{len(records)} of {lineage.get('of', '?')} iterations{note}.</p>"
        f"<main>{drawn}</main><table>{told}</table></body></html>\n"
    )


def _at(record: Mapping[str, Any], keys: Iterable[str]) -> float:
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else math.nan


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_text(v)}" for k, v in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def _figure(title: str, meaning: str, series: Mapping[str, Sequence[float]]) -> str:
    values = [v for line in series.values() for v in line if math.isfinite(v)]
    low, high = min(values), max(values)
    low, high = (low - 0.5, high + 0.5) if high - low < 1e-9 else (low, high)
    count = max(len(line) for line in series.values())
    right, top = _WIDTH - 8, 8

    def x(i: int) -> float:
        return _LEFT + (right - _LEFT) * i / max(count - 1, 1)

    def y(value: float) -> float:
        return top + (_HEIGHT - _BOTTOM - top) * (high - value) / (high - low)

    marks = [(y(v), f"{v:.3g}") for v in (low, high, *([0.0] if low < 0 < high else []))]
    axes = "".join(
        f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{label}</text>'
        for at, label in marks
    )
    axes += f'<text x="{_LEFT}" y="{_HEIGHT - 4}">0</text>'
    axes += f'<text x="{right}" y="{_HEIGHT - 4}" text-anchor="end">iteration {count - 1}</text>'
    lines, legend = "", ""
    for (name, line), colour in zip(series.items(), _cycle(len(series)), strict=True):
        for piece in _pieces(line):
            points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in piece)
            lines += f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
            if len(piece) == 1:
                lines += f'<circle cx="{x(piece[0][0]):.1f}" cy="{y(piece[0][1]):.1f}" r="1.8" fill="{colour}"/>'
        legend += f'<li><i style="background:{colour}"></i>{html.escape(name)}</li>'
    label = html.escape(f"{title} by iteration")
    return (
        f"<figure><h2>{html.escape(title)}</h2><figcaption>{html.escape(meaning)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{axes}{lines}</svg>'
        f"<ul>{legend}</ul></figure>"
    )


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _pieces(line: Sequence[float]) -> list[list[tuple[int, float]]]:
    """A line cut where it is unmeasured."""
    pieces: list[list[tuple[int, float]]] = [[]]
    for i, value in enumerate(line):
        if math.isfinite(value):
            pieces[-1].append((i, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]
