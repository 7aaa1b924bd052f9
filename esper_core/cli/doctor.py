"""`esper doctor`: checks the installation, and prints how to fix it."""

from __future__ import annotations

import click

from esper_core.cli.context import current_registry
from esper_core.cli.output import print_json, waiting


@click.command()
@click.option("--fast", is_flag=True, help="Do not import torch: no devices beyond the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def doctor(fast: bool, as_json: bool) -> None:
    """Check the installation: what is installed, what is missing, and the command that fixes it.

    Exits with 1 if something that Esper needs is missing or a plugin is broken.
    """
    import attrs

    from esper_core.cli.health import examine

    with waiting("looking around"):
        findings = list(examine(current_registry(), fast=fast))
    bad = [finding for finding in findings if finding.state == "bad"]
    if as_json:
        print_json({"ok": not bad, "findings": [attrs.asdict(finding) for finding in findings]})
    else:
        from esper_core.cli.doctor_view import show_findings

        show_findings(findings)
    if bad:
        click.get_current_context().exit(1)
