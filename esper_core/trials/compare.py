"""Arms of a comparison with growing, on the same data with paired seeds, one file each so that none is trained twice.

`grown` is the run itself; `host` never grows; `host@FLOPs` neither, and trains until it has spent what the grown run
spent; `static` has the grown run's final architecture from the first step
on and trains for the same epochs; `static@FLOPs` has a schedule of its own that ends when it has spent what the grown
run spent (growth, probes, counterfactuals and culled seeds included); `random search` shares that same budget among
random architectures of the same slots and blueprints and takes the best by validation; `random controller` grows at
random. The test split is read once an arm and seed, at its end, and decides nothing.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import attrs

from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import BadFile, BadOption, RunFailed, did_you_mean, os_error_as
from esper_core.leyline.events import renamed
from esper_core.leyline.files import typed
from esper_core.leyline.host import OWN_MODEL, TaskProtocol
from esper_core.leyline.objective import Metric
from esper_core.leyline.specs import HostSpec
from esper_core.nissa.report.control import ask_for_control
from esper_core.nissa.report.reading import read_events, training_seconds
from esper_core.nissa.report.wording import number
from esper_core.registry import Registry, load_registry, split_reference
from esper_core.storage.tensor_file import expect_well_formed, read_json_file, write_json_file
from esper_core.tolaria import assembly
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.model_file import load_plane
from esper_core.tolaria.offline import offline, without_fetching
from esper_core.tolaria.own_code import code_named, named_code, take_named
from esper_core.tolaria.run import resume_run, start_run
from esper_core.tolaria.run_folder import RunFolder
from esper_core.tolaria.setup import Setup, host_params, keep_used_settings, set_up
from esper_core.trials.intervals import paired_interval
from esper_core.trials.jobs import run_each
from esper_core.trials.static import (
    StaticResult,
    StaticSeed,
    implant,
    organs_of,
    read_split,
    step_flops,
    train_static,
)
from esper_core.trials.verdict import verdict_of
from esper_core.trials.workers import DEFAULT, open_workers

ARMS: Final = ("grown", "host", "host@FLOPs", "static", "static@FLOPs", "random search", "random controller")
"""Every arm, in the order of tables."""

EQUAL_STEPS: Final = ("host", "static")
"""Arms that train for the grown run's epochs; a run with a budget of FLOPs has none, and leaves them out."""

_AFTER_GROWN: Final = ("host@FLOPs", "static", "static@FLOPs", "random search")


@attrs.frozen
class CompareConfig:
    """Options of a comparison.

    Attributes:
        seeds: how many, from the run's own on.
        arms: which of `ARMS`; `grown` is always among them.
        candidates: random architectures of a random search, which share its FLOPs.
        workers: processes, of one thread each; 0: two, and as many as fit a Ray cluster.
        ray: the address of a Ray cluster to train on, `auto` to find it; None: here.
        disabled: plugins that workers shall not load.
    """

    seeds: int = attrs.field(default=5, validator=attrs.validators.ge(1))
    arms: tuple[str, ...] = attrs.field(default=ARMS)
    candidates: int = attrs.field(default=3, validator=attrs.validators.ge(1))
    workers: int = attrs.field(default=0, validator=attrs.validators.ge(0))
    ray: str | None = None
    disabled: tuple[str, ...] = ()

    @arms.validator
    def _known(self, _: object, value: tuple[str, ...]) -> None:
        for arm in value:
            if arm not in ARMS:
                raise BadOption(f"unknown arm {arm!r}", ", ".join(ARMS), did_you_mean(arm, ARMS))


@attrs.frozen
class Unit:
    """One arm with one seed of the comparison in `folder`. `code`: the host's code, where the user named it."""

    folder: Path
    arm: str
    seed: int
    config: RunConfig
    candidates: int
    disabled: tuple[str, ...]
    code: str = ""

    @property
    def file(self) -> Path:
        """The file of its outcome."""
        return self.folder / f"{self.arm.replace(' ', '-').replace('@', '-at-')}-{self.seed}.json"

    @property
    def grown_run(self) -> Path:
        """The run folder of the grown model of this seed."""
        done = self.folder / f"grown-{self.seed}.json"
        return Path(read_json_file(done)["run"]) if done.is_file() else self.folder / "runs" / f"grown-{self.seed}"


def compare_run(
    path: str | Path, config: CompareConfig = CompareConfig(), *, notify: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Train every arm that is not done yet, beside the finished run at `path`, and write `compare.json` into it.

    A training that fails costs the others nothing, but for those that need its outcome.

    Args:
        path: a finished run, which is the grown arm of its own seed.
        notify: told of every arm and seed that is done.

    Returns:
        What `compare.json` holds.

    Raises:
        BadFile: no run there, or one that is not finished.
        BadOption, MissingDependency: the Ray cluster cannot be used.
        RunFailed: some trainings failed; the others are in `compare.json`.
    """
    folder, run, _ = RunFolder.open(path)
    registry, control = load_registry(config.disabled), ask_for_control(folder.path, OWN_MODEL)
    result, run = folder.result(), take_named(run, registry, folder.path, control)
    if result.get("status") != "finished":
        raise BadFile(f"{folder.path} is not finished", "a finished run", f"esper resume {typed(folder.path)}")
    beside = folder.path / "compare"
    with os_error_as(
        BadFile, f"{beside} cannot be written to", "a run folder that may be written to", "copy it to such a place"
    ):
        beside.mkdir(exist_ok=True)
        own = beside / f"grown-{run.seed}.json"
        if not own.exists():
            described = _describe_grown(
                "grown", run.seed, folder.path, renamed(result), training_seconds(folder.path) or 0.0
            )
            write_json_file(own, described)
    units = _units(beside, run, config)
    todo = [unit for unit in units if not unit.file.is_file()]
    if todo:
        arms = ", ".join(dict.fromkeys(unit.arm for unit in todo))
        at_once = config.workers or (DEFAULT if config.ray is None else "as many as fit")
        took = training_seconds(folder.path)
        told = "" if took is None else f"; the run itself trained for {took:.3g} s"
        notify(f"comparing: {len(todo)} more training{'s' * (len(todo) != 1)} ({arms}), {at_once} at a time{told}")
    failed: list[tuple[Unit, Exception]] = []
    if todo:
        workers = open_workers(
            config.workers, devices={run.device}, marker=folder.path / "run.json", ray=config.ray, notify=notify
        )
        for count, attempt in enumerate(run_each(todo, run_unit, workers, ready=_is_ready, retries=1), 1):
            unit = todo[attempt.job]
            if attempt.error is not None:
                failed.append((unit, attempt.error))
                told = f"failed: {attempt.error}"
            else:
                outcome = read_json_file(unit.file)
                told = f"{outcome['metric']['name']} {outcome['score']:.4f}, loss {outcome['loss']:.4f}"
            notify(f"{unit.arm}, seed {unit.seed}: {told}; {len(todo) - count} to go")
    with expect_well_formed(beside):
        summary = summarise_arms(beside, run, config)
    write_json_file(folder.path / "compare.json", summary)
    if failed:
        unit, error = failed[0]
        given = f"{len(failed)} of {len(todo)} trainings failed; the first, {unit.arm} with seed {unit.seed}: {error}"
        raise RunFailed(given, "", f"esper compare {typed(folder.path)}, which keeps the others") from error
    return summary


def summarise_arms(beside: Path, run: RunConfig, config: CompareConfig) -> dict[str, Any]:
    """The table of arms, from the files of finished units."""
    arms = []
    judge, key = Metric(), "accuracy"
    for arm in ARMS:
        units = [unit for unit in _units(beside, run, config) if unit.arm == arm and unit.file.is_file()]
        rows = [{"score": row.get("accuracy"), **renamed(row)} for row in (read_json_file(u.file) for u in units)]
        if not rows:
            continue
        entry: dict[str, Any] = {"name": arm, "seeds": [row["seed"] for row in rows]}
        entry |= {key: [row[key] for row in rows] for key in ("score", "loss", "validation_score")}
        entry |= {key: fmean(row[key] for row in rows) for key in ("params", "flops", "wall_s")}
        if any(row["kind"] == "language-modelling" for row in rows):
            key, judge = _bits(rows)
            entry[key] = [row["loss"] / math.log(2) for row in rows]
        else:
            judge = Metric(**rows[0].get("metric", {}))
            key = "accuracy" if judge.name == "accuracy" else "score"
        if rows[0].get("metric", {}).get("name", "accuracy") == "accuracy":  # also under the names of version 0.1
            entry |= {"accuracy": entry["score"], "validation_accuracy": entry["validation_score"]}
        arms.append(entry)
    summary: dict[str, Any] = {
        "arms": arms,
        "paired": list(_pairs(arms, key)),
        "metric": key,
        "judge": attrs.asdict(judge),
    }
    verdict = verdict_of(summary)
    return summary if verdict is None else {**summary, "verdict": verdict}


def _bits(rows: Sequence[Mapping[str, Any]]) -> tuple[str, Metric]:
    """Name and metric of the loss in bits: a byte where every token is one, else a token.

    Rows written before they said what a token is are of bytes, as they were called.
    """
    unit = "byte" if all(row.get("token", "byte") == "byte" for row in rows) else "token"
    return f"bits_per_{unit}", Metric(f"bits per {unit}", higher_is_better=False, share=False)


def _token(task: TaskProtocol) -> str:
    """`byte` where every token of a task is one, else `token`."""
    return "byte" if getattr(task, "tokens", "") == "byte" else "token"


def _pairs(arms: Sequence[Mapping[str, Any]], metric: str) -> Iterator[dict[str, Any]]:
    grown = next((arm for arm in arms if arm["name"] == "grown"), None)
    for arm in arms:
        if grown is None or arm is grown:
            continue
        both = [seed for seed in grown["seeds"] if seed in arm["seeds"]]
        if both:
            scores = [[side[metric][side["seeds"].index(seed)] for seed in both] for side in (grown, arm)]
            mean, low, high = paired_interval(*scores)
            ends = {key: value if math.isfinite(value) else None for key, value in (("low", low), ("high", high))}
            yield {"arm": "grown", "minus": arm["name"], "mean": mean, **ends, "n": len(both)}


def _units(beside: Path, run: RunConfig, config: CompareConfig) -> list[Unit]:
    wanted = [arm for arm in config.arms if not (run.budget_total and arm in EQUAL_STEPS)]
    arms = tuple(dict.fromkeys(("grown", *wanted)))
    return [
        Unit(
            beside, arm, seed, attrs.evolve(without_fetching(run), seed=seed, out="", sinks=()), config.candidates,
            config.disabled, named_code(),
        )
        for seed in range(run.seed, run.seed + config.seeds)
        for arm in ARMS
        if arm in arms
    ]  # fmt: skip


def _is_ready(unit: Unit) -> bool:
    return unit.arm not in _AFTER_GROWN or (unit.folder / f"grown-{unit.seed}.json").is_file()


def run_unit(unit: Unit) -> None:
    """Train one arm with one seed and write its file. Its configuration comes from a file, so nothing is fetched."""
    with offline(), code_named(unit.code):
        _run_unit(unit)


def _run_unit(unit: Unit) -> None:
    registry = load_registry(unit.disabled)
    began = time.monotonic()
    if unit.arm in ("grown", "random controller"):
        outcome = _grow(unit, registry)
    else:
        found = _train_fixed(unit, registry)
        outcome = {
            "arm": unit.arm,
            "seed": unit.seed,
            "kind": found[0].task.kind,
            "token": _token(found[0].task),
            "loss": found[1].test_loss,
            "metric": attrs.asdict(found[0].objective.metric),
            "score": found[1].test_score,
            "validation_loss": found[1].validation_loss,
            "validation_score": found[1].validation_score,
            "params": found[1].params,
            "flops": found[2],
            "steps": found[1].steps,
            "organs": [attrs.asdict(organ) for organ in found[3]],
            "wall_s": time.monotonic() - began,
        }
    write_json_file(unit.file, outcome)


def _grow(unit: Unit, registry: Registry) -> dict[str, Any]:
    path = unit.folder / "runs" / unit.file.stem
    controller = "random" if unit.arm == "random controller" else unit.config.controller
    overseers = () if unit.arm == "random controller" else unit.config.overseers
    config = attrs.evolve(unit.config, controller=controller, overseers=overseers, out=str(path))
    config = keep_used_settings(config, registry)
    if (path / "run.json").is_file():
        result = RunFolder.open(path)[0].result()
        if result.get("status") != "finished":
            result = resume_run(path, registry=registry).to_mapping()
    else:
        result = start_run(config, registry=registry).to_mapping()
    if result["status"] != "finished":  # a signal stopped it, and it can be resumed
        raise RunFailed(f"it was stopped: {result['reason']}")
    return _describe_grown(unit.arm, unit.seed, path, result, training_seconds(path) or 0.0)


def _describe_grown(arm: str, seed: int, path: Path, result: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    config, registry = RunFolder.open(path)[1], load_registry()
    _, header = load_plane(path, registry)
    language = header["task"]["kind"] == "language-modelling"
    with offline():
        unit = _token(assembly.build_task(without_fetching(config), registry)[0]) if language else "token"
    return {
        "arm": arm,
        "seed": seed,
        "kind": header["task"]["kind"],
        "token": unit,
        "loss": result["test_loss"],
        "metric": result.get("metric", attrs.asdict(Metric())),
        "score": result["test_score"],
        "validation_loss": result["validation_loss"],
        "validation_score": result["validation_score"],
        "params": result["params"],
        "flops": training_flops(path),
        "organs": [attrs.asdict(organ) for organ in organs_of(header["structure"])],
        "controller": config.controller,
        "run": str(path),
        "wall_s": seconds,
    }


def training_flops(path: Path) -> float:
    """FLOPs of a run up to its last epoch's end, probes included; reading the test split is not training.

    Raises:
        BadFile: the run logged no epoch.
    """
    total = None
    for event in read_events(path / "events.jsonl", frozenset({"epoch_ended"})):
        if event is not None and event["kind"] == "epoch_ended":
            total = number(event.get("total_flops"))
    if total is None:
        raise BadFile(f"{path} logged no epoch", "a finished run")
    return total


def _train_fixed(unit: Unit, registry: Registry) -> tuple[Setup, StaticResult, float, tuple[StaticSeed, ...]]:
    """The arm's model, what it reached, the FLOPs that the arm spent in all, and its seeds."""
    if unit.arm == "random search":
        return _search(unit, registry)
    organs: tuple[StaticSeed, ...] = ()
    config = unit.config
    if not unit.arm.startswith("host"):
        plane, header = load_plane(unit.grown_run, registry)
        organs = organs_of(header["structure"])
        built = deeper_host(config, plane, organs, registry)
        organs, config = (organs, _with_new_weights(config, registry)) if built is None else ((), built)
    setup = set_up(config, registry)
    implant(setup.plane, organs)
    steps = setup.timetable.steps
    if unit.arm.endswith("@FLOPs"):
        steps = max(1, round(training_flops(unit.grown_run) / step_flops(setup)))
    result = train_static(setup, steps)
    return setup, result, result.flops, organs


def deeper_host(config: RunConfig, plane: Plane, organs: Sequence[StaticSeed], registry: Registry) -> RunConfig | None:
    """The configuration of a host that is as deep from the start as a grown one has become; None if there is none.

    Only where nothing but copies of blocks grew, in a host with an option for its depth: a network that is built so has
    its own initial weights, and copies of untrained blocks would not.

    Args:
        config: of the grown run. plane: the grown network. organs: its seeds.
    """
    spec = registry.find("host", split_reference(config.host)[0]).spec
    assert isinstance(spec, HostSpec)
    families = {plane.candidates[organ.blueprint].family for organ in organs}
    if not spec.sizes or families != {"depth"}:
        return None
    name = f"{spec.name}.{spec.sizes[0]}"
    option = next(option for option in spec.options if option.name == spec.sizes[0])
    depth, wanted = (
        option.parse(config.settings.get(name, option.default)),
        plane.host_params + plane.ledger.seed_params,
    )
    if not isinstance(depth, int) or depth < 1:
        return None
    with offline():
        task, _ = assembly.build_task(without_fetching(config), registry)
    for times in range(2, 33):
        deeper = attrs.evolve(config, settings={**config.settings, name: depth * times})
        params = host_params(deeper, registry, task)
        if params >= wanted:
            return deeper if params == wanted else None
    return None


def _with_new_weights(config: RunConfig, registry: Registry) -> RunConfig:
    """The configuration in which copies of blocks get new weights, as a static network has them."""
    return keep_used_settings(attrs.evolve(config, settings={**config.settings, "copy.birth": "random"}), registry)


def _search(unit: Unit, registry: Registry) -> tuple[Setup, StaticResult, float, tuple[StaticSeed, ...]]:
    """Random architectures that share the grown run's FLOPs; the best by validation is the arm's model."""
    budget, spent = training_flops(unit.grown_run) / unit.candidates, 0.0
    best: tuple[Setup, StaticResult, tuple[StaticSeed, ...]] | None = None
    for index in range(unit.candidates):
        setup = set_up(_with_new_weights(unit.config, registry), registry)
        organs = draw_organs(setup, random.Random(f"{unit.seed}:{index}"))
        result = train_static(setup, max(1, round(budget / step_flops(setup))), test=False)
        spent += result.flops
        if best is None or _score(setup, result) > _score(best[0], best[1]):
            best = setup, result, organs
    assert best is not None
    setup, result, organs = best
    final = read_split(setup, "test")
    result = attrs.evolve(result, test_loss=final.loss, test_score=final.score)
    return setup, result, spent, organs


def _score(setup: Setup, result: StaticResult) -> float:
    language = setup.task.kind == "language-modelling"
    higher = setup.objective.metric.higher_is_better
    return -result.validation_loss if language else result.validation_score if higher else -result.validation_score


def draw_organs(setup: Setup, draw: random.Random) -> tuple[StaticSeed, ...]:
    """Implant a random architecture within the run's budgets: each slot gets a seed with even odds, at least one does.

    Returns:
        What was implanted; nothing if the budgets allow no seed at all.
    """
    organs: list[StaticSeed] = []
    while True:
        views = {view.path: view for view in setup.plane.views()}
        able = [path for path, view in views.items() if view.blueprints]
        if not able:
            return tuple(organs)
        path = draw.choice(able)
        organ = StaticSeed(path, draw.choice(views[path].blueprints).name, draw.choice(setup.plane.blends))
        implant(setup.plane, [organ])
        organs.append(organ)
        if draw.random() < 1 / max(2, len(able)):
            return tuple(organs)
