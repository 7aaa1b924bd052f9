"""`esper report`: write the report of a run again, or somewhere else."""

from __future__ import annotations

import click

from esper_core.cli.arguments import find_run, run_argument
from esper_core.cli.output import say
from esper_core.leyline.errors import BadOption


@click.command()
@run_argument()
@click.option("--out", metavar="FILE", help="Where to write it.  [default: report.html in the run's folder]")
@click.option("--text", is_flag=True, help="Print the summary as text instead, and write nothing.")
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
def report(run: str, out: str | None, text: bool, show: bool) -> None:
    """Write the report of RUN as one HTML file that works offline.

    RUN is a run's folder, its name in runs/, or "latest". The run may still be in progress.
    """
    from esper_core.nissa.report import write_report

    folder = find_run(run)
    if text:
        from esper_core.cli.output import make_console
        from esper_core.cli.summary import show as print_summary
        from esper_core.nissa.report.overview import summarise_run

        if out or show:
            raise BadOption(f"--text with {'--out' if out else '--open'}", "one of them", f"esper report {run} --text")
        print_summary(summarise_run(folder), make_console(), None, None)
        return
    path = write_report(folder, out)
    say(path)
    if show:
        click.launch(path.resolve().as_uri())
