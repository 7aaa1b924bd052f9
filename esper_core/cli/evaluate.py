"""`esper eval`: evaluate a grown model."""

from __future__ import annotations

import attrs
import click

from esper_core.cli.arguments import find_run, host_option, run_argument, weights_option
from esper_core.cli.context import current_registry
from esper_core.cli.output import print_json, say
from esper_core.leyline.events import with_accuracy

SPLITS = ("train", "validation", "test")


@click.command("eval")
@run_argument()
@click.option("--split", type=click.Choice(SPLITS), default="test", show_default=True, help="Split to evaluate on.")
@weights_option
@host_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--download", is_flag=True, help="Let the task fetch what the run's configuration asks for.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def evaluate(
    run: str, split: str, weights: str, code: str, device: str, download: bool, as_json: bool
) -> None:  # fmt: skip
    """Evaluate the grown model of RUN on a split of its task."""
    folder = find_run(run)
    from esper_core.nissa.report.wording import nats, show_score
    from esper_core.tolaria.own_code import code_named
    from esper_core.tolaria.run import eval_run

    with code_named(code):
        found = eval_run(folder, split=split, weights=weights, device=device, registry=current_registry(),
                         download=download, notify=lambda text: say(text, err=True))  # fmt: skip
    if as_json:
        print_json(with_accuracy(attrs.asdict(found)))
    else:
        told = f"{show_score(found.score, found.metric, 2)} {found.metric.name}, loss {nats(found.loss)}"
        say(f"{told} on {found.examples} {split} examples")
