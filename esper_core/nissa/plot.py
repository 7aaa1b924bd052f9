"""A run's curves as a picture: validation loss and score by epoch, and when seeds were born, fossilised or culled."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from esper_core.leyline.stages import STAGES, Stage, stages_where
from esper_core.nissa.report.wording import metric_of, nats, number, show_score

WIDTH: Final = 720
"""Of a picture, in pixels, unless another is asked for."""

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 200, 64, 12, 26, 34
_INK: Final = "#3f6fd1"
"""Of the curves: at least 3 to 1 on white and on the dark backgrounds of notebooks."""

_FEW: Final = 3
"""Points that make a curve."""

_RECORDED: Final = stages_where(recorded=True)


@attrs.frozen
class Plot:
    """A picture that a notebook shows; `svg` is its text."""

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    def _repr_html_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> Path:
        """Write the picture as an SVG file, and return its path.

        Raises:
            OSError: it cannot be written.
        """
        path = Path(path)
        path.write_text(self.svg, encoding="utf-8")
        return path


def plot_events(events: Iterable[Mapping[str, Any]], width: int = WIDTH) -> Plot:
    """The curves of a run by its events, in order; without an epoch, a picture that says so.

    The points are the ends of epochs; in a run of one or two epochs they are the decisions, which may have read fewer
    examples of the validation split, and the titles say so.

    Args:
        events: of one run, as `events.jsonl` holds them.
        width: of the picture in pixels; its text has 12 pixels at any width.
    """
    metric = metric_of({})
    points: dict[str, list[tuple[float, float | None, float | None]]] = {"epoch_ended": [], "decided": []}
    marks: list[tuple[float, Stage, str]] = []
    for event in events:
        kind = event.get("kind")
        if kind == "run_started":
            metric = metric_of({"metric": event.get("metric")})
        elif kind in points:
            loss, score = number(event.get("validation_loss")), number(event.get("validation_score"))
            points[kind].append((float(event["step"]), loss, score))
        elif kind == "stage_changed":
            after = Stage(str(event.get("after")))
            if after in _RECORDED:
                told = f"{event.get('blueprint')} at {event.get('slot')}: {after.value}"
                marks.append((float(event["step"]), after, told))
    epochs, decisions = points["epoch_ended"], points["decided"]
    if not epochs:
        return Plot(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 30" role="img">'
                    '<text x="4" y="20" fill="currentColor">no epoch ended</text></svg>')  # fmt: skip
    by_decision = len(epochs) < _FEW < len(decisions)
    taken, at = (decisions, ", at decisions") if by_decision else (epochs, "")
    steps, losses = [step for step, _, _ in taken], [loss for _, loss, _ in taken]
    scores = [score for _, _, score in taken]
    panels: list[tuple[str, list[float | None], Callable[[float], str]]] = [
        (f"validation {metric.name}{at}", scores, lambda value: show_score(value, metric)),
        (f"validation loss{at}", losses, nats),
    ]  # fmt: skip
    drawn = "".join(
        _panel(width, index * _HEIGHT, title, steps, values, marks, show)
        for index, (title, values, show) in enumerate(panels)
    )
    label = f"validation {metric.name} and loss over {steps[-1]:.0f} steps, with the births and ends of seeds"
    return Plot(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {2 * _HEIGHT}" width="{width}" '
        f'style="max-width:100%;height:auto;font:12px sans-serif" role="img" aria-label="{html.escape(label)}">'
        f"{drawn}</svg>"
    )


def _panel(
    width: int, top: float, title: str, steps: Sequence[float], values: Sequence[float | None],
    marks: Sequence[tuple[float, Stage, str]], show: Callable[[float], str],
) -> str:  # fmt: skip
    """One curve over the steps, with a line for each mark."""
    known = [(x, y) for x, y in zip(steps, values, strict=True) if y is not None and math.isfinite(y)]
    low, high = min((y for _, y in known), default=0.0), max((y for _, y in known), default=1.0)
    span = high - low or abs(high) or 1.0
    low, high = low - 0.06 * span, high + 0.06 * span
    end = max([steps[-1], *(step for step, _, _ in marks)]) or 1.0

    def across(x: float) -> float:
        return _LEFT + (width - _LEFT - _RIGHT) * x / end

    def down(y: float) -> float:
        return top + _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - y) / (high - low)

    floor = top + _HEIGHT - _BOTTOM
    parts = [f'<text x="{_LEFT}" y="{top + 16}" fill="currentColor" font-weight="bold">{html.escape(title)}</text>']
    for share in (0.0, 0.5, 1.0):
        value = low + (high - low) * (0.06 + 0.88 * share)
        parts.append(
            f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{down(value):.1f}" y2="{down(value):.1f}" '
            'stroke="currentColor" stroke-opacity="0.15"></line>'
            f'<text x="{_LEFT - 6}" y="{down(value) + 4:.1f}" text-anchor="end" fill="currentColor">'
            f"{html.escape(show(value))}</text>"
        )
    for step, stage, told in marks:
        parts.append(
            f'<line x1="{across(step):.1f}" x2="{across(step):.1f}" y1="{top + _TOP}" y2="{floor}" '
            f'stroke="{STAGES[stage].colour}" stroke-width="1.5" stroke-dasharray="3 2">'
            f"<title>{html.escape(told)}, step {step:.0f}</title></line>"
        )
    points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in known)
    parts.append(f'<polyline points="{points}" fill="none" stroke="{_INK}" stroke-width="2"></polyline>')
    parts += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="2.5" fill="{_INK}"><title>'
              f"step {x:.0f}: {html.escape(show(y))}</title></circle>" for x, y in known]  # fmt: skip
    parts.append(f'<text x="{_LEFT}" y="{floor + 18}" fill="currentColor">0</text>'
                 f'<text x="{width - _RIGHT}" y="{floor + 18}" text-anchor="end" fill="currentColor">'
                 f"step {end:.0f}</text>")  # fmt: skip
    return "".join(parts)
