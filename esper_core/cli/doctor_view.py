"""The output of `esper doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.padding import Padding
from rich.text import Text

from esper_core.cli.health import HealthItem
from esper_core.cli.output import make_console, make_table

_MARKS = {"ok": ("✓", "green"), "absent": ("–", "dim"), "bad": ("✗", "red")}


def show_findings(findings: Sequence[HealthItem]) -> None:
    """Print findings by section, with the command that fixes each."""
    console = make_console()
    width = max(len(finding.name) for finding in findings)
    for section, group in groupby(findings, key=lambda finding: finding.section):
        console.print(Text(section, "bold cyan"))
        table = make_table("mark", "name", "text")
        table.columns[1].min_width = min(width, 24)
        for finding in group:
            text = Text(finding.text, "" if finding.state != "absent" else "dim")
            if finding.fix:
                text.append("\n→ " + finding.fix, "yellow" if finding.state == "bad" else "default")
            table.add_row(Text(*_MARKS[finding.state]), finding.name, text)
        console.print(Padding(table, (0, 0, 0, 2), expand=False))
        console.print()
    bad = sum(finding.state == "bad" for finding in findings)
    verdict = (
        "everything that Esper needs is installed" if not bad else f"{bad} problems; the line after each → fixes it"
    )
    console.print(Text(verdict, "red" if bad else "green"))
