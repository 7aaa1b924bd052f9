"""`esper tamiyo`: train a controller, evaluate it against baselines, show it, or adapt it to a domain."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from esper_core.cli.output import InOrder, print_json, say
from esper_core.cli.processes import is_follower, launch, refuse_verb
from esper_core.tolaria.process_count import process_count
from esper_core.tolaria.run_names import ROOT as RUNS

if TYPE_CHECKING:
    from esper_core.kasmina.ranks import Ranks
    from esper_core.simic.learning.training import Training
    from esper_core.tamiyo.core import TamiyoCore

Function = Callable[..., Any]
AGAIN = "esper tamiyo resume continues from the newest checkpoint"


def _curriculum(function: Function) -> Function:
    return click.option(
        "--curriculum", default="university", metavar="NAME|FILE", show_default=True,
        help="university, differing, internship, masterpiece, or the path of a TOML file",
    )(function)  # fmt: skip


def _workers(function: Function) -> Function:
    return click.option("--workers", type=click.IntRange(0), default=0, metavar="N",
                        help="worker processes of one thread; 0: one per core; the result is the same  [default: 0]",
                        )(function)  # fmt: skip


_devices = click.option("--devices", type=click.IntRange(1), metavar="N",
                        help="train in N processes, one a GPU, or all on the CPU; the result is the same")  # fmt: skip


def _shown(function: Function) -> Function:
    function = click.option("--json-lines", is_flag=True, help="print every iteration as a line of JSON")(function)
    return click.option("--quiet", "-q", is_flag=True, help="print only where the agent is")(function)


def _training(function: Function) -> Function:
    for option in (
        click.option("--out", metavar="FOLDER", help="where to train  [default: runs/tamiyo-<curriculum>-<n>]"),
        click.option("--iterations", type=click.IntRange(1), metavar="N", help="overrides the curriculum's number"),
        click.option("--seed", type=click.IntRange(0), default=0, metavar="N", show_default=True,
                     help="of every draw: it fixes every bit of the agent"),
        click.option("--backend", type=click.Choice(["stacked", "processes", "inline"]),
                     help="what computes episodes; stacked: all worlds of one structure at once  "
                          "[default: stacked on a GPU, else processes]"),
        click.option("--device", default="cpu", metavar="NAME", show_default=True,
                     help="cpu or cuda, of stacked worlds and of the learner"),
        click.option("--worlds-at-once", type=click.IntRange(1), default=16, metavar="N", show_default=True,
                     help="groups in one stack"),
        click.option("--group-size", type=click.IntRange(1), metavar="N",
                     help="environments in a group, instead of the curriculum's number"),
        click.option("--pieces", type=click.IntRange(1), default=1, metavar="N", show_default=True,
                     help="into which a minibatch that is scored together is split, for processes to share out"),
        _devices,
    ):  # fmt: skip
        function = option(function)
    return _curriculum(_workers(_shown(function)))


@click.group(cls=InOrder)
@click.pass_context
def tamiyo(ctx: click.Context) -> None:
    """The learned controller: a core that is trained once, and adapters that teach it a domain.

    \b
    esper tamiyo train --curriculum university
    esper tamiyo eval agent.safetensors
    esper run --controller agent:agent.safetensors
    """
    verb = ctx.invoked_subcommand or ""
    refuse_verb(f"tamiyo {verb}", [f"tamiyo {one}" for one in ("train", "resume", "adapt")])


@tamiyo.command()
@_training
@click.option("--base", metavar="FILE", help="fine-tune this agent without imitation, instead of training from scratch")
@click.option("--domain", default="", metavar="NAME", help="use only worlds of this domain")
def train(
    curriculum: str, out: str | None, iterations: int | None, seed: int, base: str | None, domain: str, workers: int,
    quiet: bool, json_lines: bool, backend: str | None, device: str, worlds_at_once: int, group_size: int | None,
    pieces: int, devices: int | None,
) -> int:  # fmt: skip
    """Train a core on a curriculum. It may be interrupted; `esper tamiyo resume` continues it bit for bit."""
    if devices is not None and devices > 1:
        return launch(devices, AGAIN)
    from esper_core.simic.learning.training import Training, new_manifest

    where = _where(backend, device, worlds_at_once, group_size, pieces)
    manifest = new_manifest(curriculum, seed=seed, iterations=iterations or 0, domain=domain, **where)
    with _processes() as ranks:
        training = Training.start(_folder(out, curriculum), manifest, base, ranks=ranks)
        return _carry_on(training, workers, quiet, json_lines)


@tamiyo.command()
@click.argument("folder", type=click.Path(file_okay=False))
@_workers
@_devices
@_shown
def resume(folder: str, workers: int, devices: int | None, quiet: bool, json_lines: bool) -> int:
    """Resume the training in FOLDER from its newest checkpoint; the result is bit-identical to an uninterrupted one."""
    if devices is not None and devices > 1:
        return launch(devices, AGAIN)
    from esper_core.simic.learning.training import Training

    with _processes() as ranks:
        return _carry_on(Training.resume(folder, ranks=ranks), workers, quiet, json_lines)


@tamiyo.command()
@_training
@click.option("--base", default="", metavar="FILE", help="the core to adapt  [default: the one that ships]")
@click.option("--domain", required=True, metavar="NAME", help="of the worlds to adapt to: vision, language, …")
@click.option("--kind", default="lora", metavar="NAME", show_default=True, help="of adapter")
def adapt(
    curriculum: str, out: str | None, iterations: int | None, seed: int, base: str, domain: str, kind: str,
    workers: int, quiet: bool, json_lines: bool, backend: str | None, device: str, worlds_at_once: int,
    group_size: int | None, pieces: int, devices: int | None,
) -> int:  # fmt: skip
    """Train an adapter for one domain on a frozen core; the core's own weights never move."""
    if devices is not None and devices > 1:
        return launch(devices, AGAIN)
    from esper_core.cli.context import current_registry
    from esper_core.simic.learning.training import Training, new_manifest
    from esper_core.tamiyo.learned import agent_path

    current_registry().find("adapter", kind)
    where = _where(backend, device, worlds_at_once, group_size, pieces)
    manifest = new_manifest(curriculum, seed=seed, iterations=iterations or 0, domain=domain, adapter=kind, **where)
    with _processes() as ranks:
        with agent_path(base) as path:
            training = Training.start(_folder(out, f"{curriculum}-{domain}"), manifest, path, ranks=ranks)
        return _carry_on(training, workers, quiet, json_lines)


@tamiyo.command("eval")
@click.argument("files", nargs=-1, metavar="[FILE]...")
@_curriculum
@click.option("--adapter", "adapters", multiple=True, metavar="FILE|DOMAIN",
              help="also evaluate the first FILE with this adapter; repeatable")  # fmt: skip
@click.option("--groups", type=click.IntRange(1), default=32, metavar="N", show_default=True,
              help="contests, each on a host and batches of its own")  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0), default=1000, metavar="N", show_default=True, help="random seed of the contests"
)
@click.option("--domain", default="", metavar="NAME", help="use only worlds of this domain")
@click.option("--held-out/--trained", default=True, help="worlds that were held out, or those trained on")
@click.option("--controllers", metavar="A,B", help="controls beside the agents  [default: the curriculum's]")
@click.option("--out", metavar="FILE", help="write everything that was measured there as JSON")
@_workers
@click.option("--json", "as_json", is_flag=True, help="print the summary as JSON")
def evaluate(
    files: tuple[str, ...], curriculum: str, adapters: tuple[str, ...], groups: int, seed: int, domain: str,
    held_out: bool, controllers: str | None, out: str | None, workers: int, as_json: bool,
) -> None:  # fmt: skip
    """Compare agents with controls on the same hosts and batches; prints differences with 95% intervals.

    FILE is an agent; without one, it is the one that ships with Esper.
    """
    from esper_core.cli.tamiyo_view import show_evaluation
    from esper_core.simic.learning.curriculum import load_curriculum
    from esper_core.simic.learning.evaluation import EvaluationPlan
    from esper_core.simic.learning.evaluation import evaluate as play
    from esper_core.storage.tensor_file import write_json_file

    plan = load_curriculum(curriculum)
    names = plan.controllers if controllers is None else [c.strip() for c in controllers.split(",") if c.strip()]
    told = EvaluationPlan(groups=groups, seed=seed, held_out=held_out, domain=domain, controllers=tuple(names))

    def notify(played: int) -> None:
        if not as_json:
            say(f"{played} of {groups} contests", err=True)

    result = play(plan, _contenders(files, adapters), told, workers=workers, notify=notify)
    if out:
        write_json_file(out, result)
    if as_json:
        print_json({key: value for key, value in result.items() if key != "contests"})
    else:
        show_evaluation(result)


@tamiyo.command()
@click.argument("file", required=False, default="")
@click.option("--json", "as_json", is_flag=True, help="print JSON for programs")
def show(file: str, as_json: bool) -> None:
    """Say what FILE, an agent or an adapter, is and how it was trained.

    Without FILE: the agent that ships. `vision` and `language` name the adapters that ship.
    """
    from esper_core.cli.tamiyo_view import describe_product, show_product
    from esper_core.tamiyo.learned import agent_path

    with agent_path(file) as path:
        told = describe_product(path)
    if as_json:
        print_json(told)
    else:
        show_product(told)


@tamiyo.command()
@click.argument("adapter")
@click.option("--base", default="", metavar="FILE", help="the adapter's core  [default: the one that ships]")
@click.option("--out", required=True, metavar="FILE", help="where to write the merged agent")
def merge(adapter: str, base: str, out: str) -> None:
    """Write ADAPTER into the weights of its core: one agent file that needs no adapter."""
    from esper_core.tamiyo.adapter import merge_adapter
    from esper_core.tamiyo.learned import core_for, load_agent, open_adapter

    core, file = load_agent(core_for(base, adapter)), open_adapter(adapter)
    core.attach(file, "merged")
    merge_adapter(core, "merged").save(out)
    say(out)


@contextmanager
def _processes() -> Iterator[Ranks]:
    """The processes that torchrun has started to train together; this one alone where there are no others."""
    from esper_core.kasmina.ranks import ALONE

    if process_count() == 1:
        yield ALONE
        return
    from esper_core.tolaria.processes import join_to_play, leave

    try:
        yield join_to_play(AGAIN)
    finally:
        leave()


def _where(
    backend: str | None, device: str, worlds_at_once: int, group_size: int | None, pieces: int
) -> dict[str, Any]:  # fmt: skip
    """What a manifest says of where episodes are computed; a device that is not there is refused."""
    from esper_core.tolaria.assembly import choose_device

    found = str(choose_device(device))
    if process_count() > 1 and found != "cpu":
        from esper_core.tolaria.processes import own_device

        own_device(found)
    return {
        "backend": backend or ("processes" if found == "cpu" else "stacked"), "device": found,
        "worlds_at_once": worlds_at_once, "group_size": group_size or 0, "pieces": pieces,
    }  # fmt: skip


def _folder(out: str | None, name: str) -> Path:
    if out:
        return Path(out)
    stem, number = f"tamiyo-{Path(name).stem}", 1
    while (RUNS / f"{stem}-{number}").exists():
        number += 1
    return RUNS / f"{stem}-{number}"


def _carry_on(training: Training, workers: int, quiet: bool, json_lines: bool) -> int:
    from esper_core.cli.tamiyo_view import TrainingView

    if is_follower():
        training.run(workers)
        return 0
    with TrainingView(training, quiet=quiet, json_lines=json_lines) as view:
        try:
            product = training.run(workers, view.take)
        except KeyboardInterrupt:
            from esper_core.leyline.files import typed

            view.close()
            say(f"resume with: esper tamiyo resume {typed(training.path)}", err=True)
            raise click.Abort from None
    for notice in sorted(training.notices):
        say(notice, err=True)
    if not json_lines:
        say(product)
    return 0


def _contenders(files: Sequence[str], adapters: Sequence[str]) -> dict[str, TamiyoCore]:
    """Cores by the name that the table gives them."""
    from esper_core.tamiyo.learned import SHIPPED_CORES, core_for, load_agent, open_adapter

    cores: dict[str, TamiyoCore] = {}
    for file in files or ("",):
        cores[_unused(Path(file).stem if file else SHIPPED_CORES[-1], cores)] = load_agent(file)
    for file in adapters:
        core = load_agent(core_for(files[0] if files else "", file))
        adapter = core.attach(open_adapter(file))
        cores[_unused(f"+{adapter.domain or Path(file).stem}", cores)] = core
    return cores


def _unused(name: str, taken: dict[str, TamiyoCore]) -> str:
    return name if name not in taken else f"{name}#{sum(n.partition('#')[0] == name for n in taken) + 1}"
