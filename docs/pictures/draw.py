"""Draws the pictures of README and site from code and recorded results: `python docs/pictures/draw.py`; `--check` compares.

`frontier.svg`: protocol P8 of `benchmarks/growth`, every tuned arm at 1e15 FLOP. `lifecycle.svg`: the table of stages.
`billion.svg`: losses of the GPT that deepens to 1.2 billion parameters, of `benchmarks/several_gpus`.
"""

from __future__ import annotations

import json
import sys
from html import escape
from itertools import pairwise
from pathlib import Path

from esper_core.leyline.stages import EMPTY, STAGES, TRANSITIONS, Op

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "growth" / "results" / "p8.json"
BILLION = HERE.parents[1] / "benchmarks" / "results" / "several-gpus.json"
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1f2430 } .dim { fill: #565d6b } .line { stroke: #8a91a0; fill: none }
.grown { fill: #1a7f4b } .static { fill: #3d55b8 } .box { fill: #eef0f8; stroke: #3d55b8 } .new { fill: #d8f0e3; stroke: #1a7f4b }
.back { fill: #ffffff } .head { font-weight: 600 }
@media (prefers-color-scheme: dark) { text { fill: #e6e8ee } .dim { fill: #aab1c0 } .back { fill: #16181f }
.grown { fill: #57d495 } .static { fill: #93a7ff } .box { fill: #232738; stroke: #93a7ff } .new { fill: #173527; stroke: #57d495 } }
</style>"""


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """One picture that needs nothing else."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>", STYLE, f'<rect class="back" width="{width}" height="{height}" rx="6"/>',
            *parts, "</svg>", "",
        ]
    )  # fmt: skip


def text(x: float, y: float, what: str, kind: str = "", anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(what)}</text>'


def frontier() -> str:
    """Loss by size at equal FLOPs: the static networks, and the one that grew."""
    summary = next(s for s in json.loads(RESULTS.read_text())["summaries"] if s["name"] == "p8-1e15")
    arms = summary["tuned"]
    static = {n: a for n, a in arms.items() if a["static"]}
    grown = {n: a for n, a in arms.items() if n == "heuristic 3x128"}
    left, right, top, bottom = 356.0, 860.0, 62.0, 288.0
    least, most, low, high = 0.5e6, 4.25e6, 0.975, 1.07

    def place(arm: dict[str, float]) -> tuple[float, float]:
        x = left + (arm["params"] - least) / (most - least) * (right - left)
        return x, bottom - (arm["validation_loss"] - low) / (high - low) * (bottom - top)

    parts = [
        text(24, 30, "3 blocks become 12 in training", "head"),
        text(left - 36, 30, "At equal compute it ends below every static size tried", "head"),
    ]
    for column, (count, told) in enumerate(((3, "begins"), (6, "copied once"), (12, "copied twice"))):
        x = 46 + column * 92
        for block in range(count):
            y = 268 - block * 17
            parts.append(
                f'<rect x="{x}" y="{y}" width="48" height="13" rx="3" class="{"box" if block < 3 else "new"}"/>'
            )
        parts.append(text(x + 24, 300, told, "dim", "middle"))
    parts.append(f'<path class="line" d="M{left} {top} V{bottom} H{right}"/>')
    for loss in (0.98, 1.0, 1.02, 1.04, 1.06):
        y = bottom - (loss - low) / (high - low) * (bottom - top)
        parts.append(text(left - 6, y + 4, f"{loss:.2f}", "dim", "end"))
        parts.append(f'<path class="line" stroke-opacity=".25" d="M{left} {y:.1f} H{right}"/>')
    for millions in (1, 2, 3, 4):
        parts.append(
            text(
                left + (millions * 1e6 - least) / (most - least) * (right - left), 304, f"{millions}M", "dim", "middle"
            )
        )
    parts.append(text((left + right) / 2, 326, "parameters at the end", "dim", "middle"))
    parts.append(text(left + 4, top - 8, "validation loss, nats a byte", "dim"))
    for name, arm in static.items():
        x, y = place(arm)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="static"><title>{escape(name)}: {arm["validation_loss"]:.4f}</title></circle>'
        )
    for name, arm in grown.items():
        x, y = place(arm)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" class="grown"><title>{escape(name)}: {arm["validation_loss"]:.4f}</title></circle>'
        )
        parts.append(text(x + 14, y + 4, "grown by Esper", "grown"))
    best = min(static.values(), key=lambda a: a["validation_loss"])
    x, y = place(best)
    parts.append(text(x - 12, y + 18, "best static size", "static", "end"))
    told = "A byte-level GPT, 1e15 FLOP a run, AdamW, validation text, one seed; two or three learning rates tried for each point"
    parts.append(text(24, 348, told, "dim"))
    parts.append(
        text(
            24, 366, "(protocol P8). On the test text, over three fresh seeds: 2.5% below the best static size.", "dim"
        )
    )
    return svg(900, 376, "Loss against size at equal compute: the grown network is below all static ones", parts)


def lifecycle() -> str:
    """The stages in a row, with what leads from one to the next."""
    row = [EMPTY]
    while True:
        after = [
            t.target for t in TRANSITIONS if t.source == row[-1] and t.op in (Op.ADVANCE, Op.GERMINATE) and t.target
        ]
        after = [stage for stage in after if stage not in row]
        if not after:
            break
        row.append(min(after, key=lambda s: list(STAGES).index(s)))
    rest = [stage for stage in STAGES if stage not in row]
    parts, places = [text(20, 28, "The life of a seed", "head")], {}
    for number, stage in enumerate(row):
        places[stage] = 20.0 + number * 134, 52.0
    for number, stage in enumerate(rest):
        places[stage] = 422.0 + number * 134, 186.0
    for stage, (x, y) in places.items():
        kind = "new" if STAGES[stage].contributes else "box"
        parts.append(
            f'<rect x="{x}" y="{y}" width="108" height="34" rx="6" class="{kind}"><title>{escape(STAGES[stage].summary)}</title></rect>'
        )
        parts.append(f'<text x="{x + 54}" y="{y + 22}" text-anchor="middle" style="font-size:11px">{stage.name}</text>')
    for one, two in pairwise(row):
        x, y = places[one]
        gates = [g for t in TRANSITIONS if t.source == one and t.target == two for g in t.gates]
        parts.append(arrow(x + 108, y + 17, places[two][0], y + 17))
        for line, gate in enumerate(gates[:2]):
            parts.append(f'<text x="{x + 121}" y="{108 + line * 15}" text-anchor="middle" class="dim" style="font-size:9px">'
                         f"{escape(gate.measure)} {escape(gate.comparison)} {gate.threshold:g}</text>")  # fmt: skip
    for one, two in pairwise(rest):
        parts.append(arrow(places[one][0] + 108, 203, places[two][0], 203))
    parts.append(f'<path class="line" d="M{places[row[2]][0]} 142 H{places[row[-1]][0] + 108}"/>')
    parts.append(arrow(476, 142, 476, 186))
    parts.append(text(490, 166, "a seed that does not pay withers; at alpha 0 it is culled at once", "dim"))
    parts.append(text(20, 208, "green: the seed changes the model's output", "dim"))
    return svg(960, 240, "Stages of a seed from dormant to fossilized, and the way out by withering", parts)


def billion() -> str:
    """Losses before and after the deepening, each stretch of 20 steps."""
    rows = [row for row in json.loads(BILLION.read_text())["billion"] if row["stage"] == "training"]
    left, right, top, bottom, most = 70.0, 700.0, 64.0, 250.0, 3.0
    last = rows[-1]["step"]

    def place(step: float, loss: float) -> tuple[float, float]:
        return left + step / last * (right - left), bottom - (min(loss, most) - 1.0) / (most - 1.0) * (bottom - top)

    deepened = next(row["step"] for row in rows if row["deepened"])
    x = place(deepened, 1.0)[0]
    parts = [
        text(24, 28, "Validation loss (nats a byte) while 605M parameters become 1.21B", "head"),
        f'<path class="line" stroke-dasharray="4 4" d="M{x:.1f} {top} V{bottom}"/>',
        text(x + 6, top + 12, f"12 blocks become 24 after step {deepened}", "dim"),
        f'<path class="line" d="M{left} {top} V{bottom} H{right}"/>',
    ]
    for loss in (1.0, 2.0, 3.0):
        parts.append(text(left - 8, place(0, loss)[1] + 4, f"{loss:.0f}", "dim", "end"))
    points = [(row, *place(row["step"], row["validation_loss"])) for row in rows]
    trace = " L".join(f"{x:.1f} {y:.1f}" for _, x, y in points)
    parts.append(f'<path class="line" d="M{trace}"/>')
    for row, x, y in points:
        kind = "grown" if row["layers"] == 24 else "static"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        parts.append(text(x, y - 10, f"{row['validation_loss']:.2f}", "dim", "middle"))
        parts.append(text(x, bottom + 18, f"{row['step']}", "dim", "middle"))
    parts.append(text(right, bottom + 36, "steps of 65,536 bytes", "dim", "end"))
    return svg(740, 300, "Validation loss of a GPT that deepens to 1.21 billion parameters", parts)


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head."""
    if x1 == x2:
        head = f"M{x2 - 4} {y2 - 7} L{x2} {y2} L{x2 + 4} {y2 - 7}"
    else:
        head = f"M{x2 - 7} {y2 - 4} L{x2} {y2} L{x2 - 7} {y2 + 4}"
    return f'<path class="line" d="M{x1} {y1} L{x2} {y2} {head}"/>'


PICTURES = {"frontier.svg": frontier, "lifecycle.svg": lifecycle, "billion.svg": billion}


def main(arguments: list[str]) -> int:
    """Write the pictures, or with `--check` say which differ."""
    differing = 0
    for name, draw in PICTURES.items():
        drawn, path = draw(), HERE / name
        if "--check" in arguments:
            same = path.is_file() and path.read_text("utf-8") == drawn
            differing += not same
            print("" if same else f"{path} differs: python docs/pictures/draw.py", end="" if same else "\n")
        else:
            path.write_text(drawn, "utf-8")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
