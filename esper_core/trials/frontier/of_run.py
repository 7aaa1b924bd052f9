"""The frontier of a finished run: static networks of other sizes at its FLOPs, each tuned, beside the grown one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from esper_core.leyline.errors import BadFile, BadOption
from esper_core.leyline.files import typed
from esper_core.leyline.host import OWN_MODEL
from esper_core.leyline.specs import HostSpec
from esper_core.nissa.report.control import ask_for_control
from esper_core.registry import Registry, split_reference
from esper_core.storage.tensor_file import write_json_file
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.own_code import take_named
from esper_core.tolaria.run_folder import RunFolder
from esper_core.trials.compare import training_flops
from esper_core.trials.frontier.job import Job
from esper_core.trials.frontier.plan import Frontier, static_name
from esper_core.trials.frontier.queue import read_rows, run_queue
from esper_core.trials.frontier.table import summarise_frontier
from esper_core.trials.isoflop import flops_to_reach, token_worth

_OWN: Final = ("out", "seed", "learning_rate", "budget_total", "minutes", "decay", "sinks", "overseers")
"""Fields of a run that are not those of the runs beside it."""


def compare_frontier(
    path: str | Path,
    registry: Registry,
    *,
    seeds: int = 3,
    workers: int = 2,
    notify: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train the networks that are missing, and write `frontier.json` into the run's folder.

    Args:
        path: a finished run with a budget of FLOPs, of a host that says which options set its size.
        seeds: fresh ones for the best static size, the host and the grown network.

    Returns:
        What `frontier.json` holds: see `summarise_frontier`, and `equal_loss`, `token_worth` and `regret`, each None
        where it is unknown.

    Raises:
        BadFile: the run is not finished. BadOption: it has no budget, or its host no sizes.
    """
    folder, run, _ = RunFolder.open(path)
    run = take_named(run, registry, folder.path, ask_for_control(folder.path, OWN_MODEL))
    if folder.result().get("status") != "finished":
        raise BadFile(f"{folder.path} is not finished", "a finished run", f"esper resume {typed(folder.path)}")
    if not run.budget_total:
        raise BadOption(f"{folder.path} went by epochs", "a run with a budget", "esper run … --budget-total 1e13")
    frontier = frontier_of(run, training_flops(folder.path), registry, seeds)
    rows = folder.path / "compare" / "frontier.jsonl"
    kind = "cuda" if run.device.startswith("cuda") else "cpu"
    run_queue(lambda rows: plan_of_run(frontier, rows), frontier.base, rows, workers={kind: workers}, notify=notify)
    summary = describe_frontier(frontier, read_rows(rows))
    write_json_file(folder.path / "frontier.json", summary)
    return summary


def frontier_of(run: RunConfig, budget: float, registry: Registry, seeds: int) -> Frontier:
    """The plan: sizes around the host's own, at a budget of FLOPs."""
    spec = registry.find("host", split_reference(run.host)[0]).spec
    assert isinstance(spec, HostSpec)
    options = {option.name: option for option in spec.options}
    own = [options[name].parse(run.settings.get(f"{spec.name}.{name}", options[name].default)) for name in spec.sizes]
    if not own or not all(isinstance(size, int) and size > 0 for size in own):
        hint = f"--set {spec.name}.{spec.sizes[0]}=2" if spec.sizes else "esper compare RUN --arms host@FLOPs"
        raise BadOption(f"the sizes of host {run.host} are unknown", "a host with size options", hint)
    base = {key: value for key, value in run.to_mapping().items() if key not in _OWN}
    host = tuple(int(str(size)) for size in own)
    grown = Job(arm="grown", budget=budget, size=dict(zip(spec.sizes, host, strict=True)), rate=0.0, heuristic=True,
                order=str(run.settings.get("heuristic.deepen_order", "stack")))  # fmt: skip
    rate = run.learning_rate
    return Frontier(
        name=spec.name, base=base, budget=budget, sizes=sizes_around(host), host=host, options=spec.sizes,
        grown=(grown,), rates=(rate, 2 * rate, rate / 2), decays=(0.4, 0.2), finalists=1, seeds=seeds, tune_seed=1000,
        margin=0.15,  # the best rate of other sizes is unknown
    )  # fmt: skip


def sizes_around(host: Sequence[int]) -> list[tuple[int, ...]]:
    """Deeper and shallower networks of the host's width, and of about three quarters and one and a third of it."""
    depth, *rest = host
    sizes = [(deep, *rest) for deep in sorted({max(1, depth // 2), depth, 2 * depth, 3 * depth, 4 * depth})]
    if rest:
        width, *others = rest
        step = next((step for step in (64, 32, 16, 8) if width % step == 0 and width > step), 1)
        narrow, wide = step * int(0.8 * width / step), step * -int(-1.3 * width // step)
        sizes += [(times * depth, narrow, *others) for times in (2, 3, 4)] if narrow else []
        sizes += [(times * depth, wide, *others) for times in (1, 2)]
    return list(dict.fromkeys(sizes))


def plan_of_run(frontier: Frontier, rows: Sequence[Mapping[str, Any]]) -> Iterator[Job]:
    """The frontier's own jobs; then those that measure the value of a token and of a FLOP."""
    done = {row["key"] for row in rows}
    waiting = False
    for job in frontier.plan(rows):
        waiting = waiting or job.key not in done
        yield job
    if not waiting:
        yield from (job for job in _extras(frontier, rows).values() if job is not None)


def _extras(frontier: Frontier, rows: Sequence[Mapping[str, Any]]) -> dict[str, Job | None]:
    """`half`: the best static size at half the budget. `large`, `all`: the grown network's final size from scratch, on
    the tokens that it saw at that size, and on as many as it saw in all."""
    found = {row["key"]: row for row in rows}
    arms = {arm.arm: frontier.tuned(arm, found) for arm in frontier.arms()}
    static = min((j for j in arms.values() if j.is_static), key=lambda job: found[job.key]["loss"])
    grown, host = arms["grown"], arms[static_name(frontier.host)]
    half = attrs.evolve(static, arm="half the FLOPs", stage="worth", budget=frontier.budget / 2)
    row = found[grown.key]
    births = len(row["grown_at"]) if grown.order == "stack" else 0
    if not births:
        return {"half": half, "large": None, "all": None}
    depth = frontier.options[0]
    final = attrs.evolve(
        host, size={**host.size, depth: host.size[depth] * 2**births}, stage="worth", rate=grown.rate, decay=grown.decay
    )
    each = _flops_a_step(final, found)
    if each is None:  # the final size is none of those that were swept
        return {"half": half, "large": None, "all": None}
    after = row["steps"] * (1.0 - row["grown_at"][-1])
    return {
        "half": half,
        "large": attrs.evolve(final, arm="its last tokens", budget=after * each),
        "all": attrs.evolve(final, arm="all its tokens", budget=row["steps"] * each),
    }


def _flops_a_step(job: Job, found: Mapping[str, Mapping[str, Any]]) -> float | None:
    same = [row for row in found.values() if row["size"] == dict(job.size) and not row["grow"] and not row["heuristic"]]
    return float(same[0]["flops"] / same[0]["steps"]) if same else None


def describe_frontier(frontier: Frontier, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The summary with the value of a FLOP and of a token; parts that were not run are None."""
    summary = summarise_frontier(frontier, rows)
    found = {row["key"]: row for row in rows}
    if any(arm.key not in found for arm in frontier.arms()):
        return {**summary, "equal_loss": None, "token_worth": None, "regret": None}
    extras = {name: found.get(job.key) if job else None for name, job in _extras(frontier, rows).items()}
    grown = found[frontier.tuned(frontier.arms()[0], found).key]
    best = min(t["validation_loss"] for t in summary["tuned"].values() if t["static"])
    equal = worth = None
    if extras["half"]:
        reach = flops_to_reach(grown["loss"], {frontier.budget / 2: extras["half"]["loss"], frontier.budget: best})
        equal = frontier.budget / reach if reach == reach else None
    scratch = [row for row in (extras["large"], extras["all"]) if row is not None]
    if len(scratch) == 2:
        large = grown["steps"] * (1.0 - grown["grown_at"][-1])
        known = {row["steps"]: row["loss"] for row in scratch}
        value = token_worth(grown["steps"] - large, large, grown["loss"], known)
        worth = value if value == value else None
    return {**summary, "equal_loss": equal, "token_worth": worth, "regret": _regret(frontier, found)}


def _regret(frontier: Frontier, found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Worst loss over that of the best arm at the same share of the budget, while the rate is constant, by arm.

    From a tenth of the budget on; a share (0.01 is a hundredth more loss than the best had then).
    """
    curves = {arm.arm: [loss for _, loss in found[frontier.tuned(arm, found).key]["curve"]] for arm in frontier.arms()}
    length = min(map(len, curves.values()))
    places = range(length // 10, int(length * (1 - max(frontier.decays))))
    best = {at: min(curve[at] for curve in curves.values()) for at in places}
    return {name: max((curve[at] / best[at] - 1 for at in places), default=0.0) for name, curve in curves.items()}
