"""The table of arms in the terminal: differences of growing from each alternative, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper_core.leyline.objective import Metric
from esper_core.leyline.pairs import TOO_FEW
from esper_core.nissa.report.control import arm_scores, differences, judge_of, show_ends, verdict_of_record
from esper_core.nissa.report.wording import number, quantity

FOREST: Final = 21
"""Cells of the drawn interval."""


def show_arms(compare: Mapping[str, Any], console: Console) -> None:
    """Print the arms of a `compare.json`: mean over seeds, and the paired difference from the grown arm."""
    table = arms_table(compare)
    fits = console.measure(table, options=console.options.update(max_width=1000)).maximum <= console.width
    console.print(table if fits else arms_table(compare, wide=False))
    judge = judge_of(compare)
    metric = f"points of {judge.name}" if judge.share else judge.name
    metric += "" if judge.higher_is_better else " (less is better)"
    console.print(
        Text(f"Differences: grown minus the arm, in {metric}, paired by seed, with 95% intervals.", style="dim")
    )
    verdict = verdict_of_record(compare)
    if verdict:
        console.print(Text(verdict, style="bold"))


def arms_table(compare: Mapping[str, Any], *, wide: bool = True) -> Table:
    """The arms as a rich table; a `wide` one has the intervals drawn and the seconds."""
    judge = judge_of(compare)
    paired = {str(p.get("minus")): p for p in differences(compare) if p.get("arm") == "grown"}
    widest, largest = (max([1e-12, *(abs(number(p.get(end)) or 0.0) for p in paired.values() for end in ends)])
                       for ends in (("low", "high", "mean"), ("mean",)))  # fmt: skip
    reach = min(widest, 4 * largest)  # one huge interval must not flatten the others
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("arm", no_wrap=True)
    table.add_column(
        judge.name.replace(" per ", "/") if judge.name.startswith("bits per ") else judge.name, justify="right"
    )
    table.add_column("grown − arm", no_wrap=True)
    if wide:
        table.add_column("−" + "0".center(FOREST - 2) + "+", no_wrap=True, header_style="dim")
    for name in ("parameters", "FLOP", *(("seconds", "seeds") if wide else ())):
        table.add_column(name, justify="right")
    for arm in compare.get("arms", []):
        scores = arm_scores(compare, arm)
        shown = "unknown" if not scores else f"{100 * fmean(scores):.2f}%" if judge.share else f"{fmean(scores):.4f}"
        difference = paired.get(str(arm.get("name")), {})
        words, style = _difference(difference, judge)
        cells: list[str | Text] = [str(arm.get("name")), shown, Text(words, style)]
        if wide:
            cells.append(Text(_forest(difference, reach), style))
        cells += [quantity(arm.get("params")), quantity(arm.get("flops"))]
        if wide:
            seconds = number(arm.get("wall_s"))
            cells += ["unknown" if seconds is None else f"{seconds:.0f}", str(len(scores))]
        table.add_row(*cells, style="bold" if arm.get("name") == "grown" else "")
    return table


def _difference(paired: Mapping[str, Any], judge: Metric) -> tuple[str, str]:
    mean, low, high = (number(paired.get(key)) for key in ("mean", "low", "high"))
    if mean is None:
        return "", ""
    shown = f"{100 * mean:+.2f}" if judge.share else f"{mean:+.4f}"
    if low is None or high is None:
        return f"{shown}, {TOO_FEW}", ""
    won, lost = (low > 0, high < 0) if judge.higher_is_better else (high < 0, low > 0)
    return f"{shown} {show_ends(low, high, judge)}", "green" if won else "red" if lost else ""


def _forest(paired: Mapping[str, Any], reach: float) -> str:
    """The interval drawn on a line with zero in its middle."""
    values = [number(paired.get(key)) for key in ("low", "mean", "high")]
    cells = [" "] * FOREST
    cells[FOREST // 2] = "│"
    exact = [None if v is None else round((FOREST - 1) * (v / reach + 1) / 2) for v in values]
    at = [None if v is None else min(FOREST - 1, max(0, v)) for v in exact]
    if at[0] is not None and at[2] is not None:
        cells[at[0] : at[2] + 1] = "─" * (at[2] + 1 - at[0])
        cells[at[0]] = "‹" if exact[0] != at[0] else "─"
        cells[at[2]] = "›" if exact[2] != at[2] else "─"
    if at[1] is not None:
        cells[at[1]] = "●"
    return "".join(cells)
