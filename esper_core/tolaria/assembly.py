"""Builds the parts that a configuration names, through the registry: task, host, plane, controller and rewards."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Final, TypeVar

import attrs
import torch
from torch import nn

from esper_core.kasmina.around import PREFIX, resolve_points
from esper_core.kasmina.blends import parts_of_blends
from esper_core.kasmina.flops import count_flops
from esper_core.kasmina.ledger import Limits
from esper_core.kasmina.modes import evaluating
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.scoring import refuse_misfit
from esper_core.leyline.errors import BadOption
from esper_core.leyline.host import HostProtocol, TaskProtocol
from esper_core.leyline.objective import Objective, default_objective
from esper_core.leyline.options import option_field, options_of, resolve_options
from esper_core.leyline.outcome import RewardTerm
from esper_core.leyline.specs import HostSpec
from esper_core.leyline.view import Controller
from esper_core.registry import Registry, split_reference
from esper_core.tolaria.allocating import AllocationConfig
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.governor import GovernorConfig
from esper_core.tolaria.optimizer import OptimizerConfig
from esper_core.tolaria.sharding import ShardingConfig
from esper_core.tolaria.timetable import Timetable


@attrs.frozen
class PlaneConfig:
    """Options `plane.NAME` of a run."""

    ramp: float = option_field(0.08, "share of the run that alpha takes to rise at standard tempo", 0.0, 1.0)
    embargo: int = option_field(2, "decisions for which a culled slot stays empty", 0)
    max_stack: int = option_field(1, "fossilised seeds that may be stacked at one point", 1)
    merge: bool = option_field(False, "merge fossilised seeds into the weights of their layers, where possible")


@attrs.frozen
class SensorConfig:
    """Options `sensors.NAME` of a run."""

    every: int = option_field(4, "sample one batch in this many; at least two between decisions where possible", 1)
    fossils: int = option_field(4, "decisions between counterfactuals of a fossilised seed; others have one each", 1)


PARTS: Final[Mapping[str, type[attrs.AttrsInstance]]] = {
    "allocation": AllocationConfig, "fsdp2": ShardingConfig, "governor": GovernorConfig, "optimizer": OptimizerConfig,
    "plane": PlaneConfig, "sensors": SensorConfig,
}  # fmt: skip
"""The run's own parts whose options `--set part.option=value` reaches, beside those of plugins."""

_LARGEST_BUDGET: Final = 1e18

_Part = TypeVar("_Part", bound=attrs.AttrsInstance)


def part_config(config: RunConfig, name: str, kind: type[_Part]) -> _Part:
    """The options of one of the run's own parts.

    Raises:
        BadOption: it takes no such option, or not with that value.
    """
    return kind(**resolve_options(name, options_of(kind), config.settings_of(name)))


def options_for(config: RunConfig, registry: Registry, kind: str, name: str) -> dict[str, object]:
    """The settings that the part of that kind and name takes; another kind may own the same name."""
    takes = {option.name for option in registry.find(kind, name).spec.options}
    return {key: value for key, value in config.settings_of(name).items() if key in takes}


def choose_device(name: str) -> torch.device:
    """The device that `--device` means.

    Raises:
        BadOption: no such device here.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    expected = "auto, cpu, cuda, cuda:N or mps"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadOption(f"there is no device {name!r}", expected, "--device auto") from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0].partition(". ")[0]
        raise BadOption(f"device {name!r} cannot be used here: {why}", expected, "--device auto") from error
    return device


def task_reference(config: RunConfig, registry: Registry) -> str:
    """The task of a run in the form in which it is typed: what `config` names, or else its host's default."""
    if config.task:
        return config.task
    spec = registry.find("host", split_reference(config.host)[0]).spec
    assert isinstance(spec, HostSpec)
    return spec.default_task


def build_task(config: RunConfig, registry: Registry) -> tuple[TaskProtocol, str]:
    """The task of a run, and its name in the form in which it is typed."""
    name = task_reference(config, registry)
    kind, argument = split_reference(name)
    options = options_for(config, registry, "task", kind)
    if config.download:
        if not any(option.name == "download" for option in registry.find("task", kind).spec.options):
            raise BadOption(f"task {name!r} fetches nothing", "a run without --download")
        options.setdefault("download", True)
    return registry.build("task", kind, argument, seed=config.seed, options=options), name


def build_objective(config: RunConfig, registry: Registry, task: TaskProtocol) -> Objective:
    """The objective of a run: the one that `config` names, or else the task's own.

    Raises:
        EsperError: no such objective, or an option of it that cannot be used.
    """
    name = config.objective or default_objective(task)
    options = options_for(config, registry, "objective", name)
    return registry.build("objective", name, outputs=task.outputs, options=options)  # type: ignore[no-any-return]


def build_host(config: RunConfig, registry: Registry, outputs: int, input_shape: tuple[int, ...]) -> HostProtocol:
    """The host of a run with its initial weights, on the CPU; two-dimensional convolutions in channels-last layout.

    That layout changes no weight; on a CPU it takes between 1.06 and 0.57 times as long (docs/speed.md). Seeds take it
    over from their host.
    """
    name, argument = split_reference(config.host)
    torch.manual_seed(config.seed)
    host: HostProtocol = registry.build(
        "host", name, argument, outputs=outputs, input_shape=input_shape, seed=config.seed,
        options=options_for(config, registry, "host", name),
    )  # fmt: skip
    if any(isinstance(module, nn.Conv2d) for module in host.module.modules()):
        host.module.to(memory_format=torch.channels_last)
    return host


def build_plane(
    config: RunConfig, registry: Registry, host: HostProtocol, *, host_flops: int, timetable: Timetable
) -> Plane:
    """The plane over a host, with the run's budgets."""
    options = part_config(config, "plane", PlaneConfig)
    host_params = sum(p.numel() for p in host.module.parameters())
    blueprints = config.blueprints or None
    parts = parts_of_blends(config.blends, registry)
    names = blueprints or [part.name for part in registry.specs("blueprint")]
    return Plane(
        host, registry, blueprints=blueprints, blends=config.blends, seed=config.seed, rent=config.rent,
        points=None if config.slots in ((), ("auto",)) else resolve_points(host, config.slots),
        limits=Limits(
            parse_budget("budget_params", config.budget_params, host_params),
            parse_budget("budget_flops", config.budget_flops, host_flops),
        ),
        ramp_steps=timetable.ramp_steps(options.ramp), embargo=options.embargo, max_stack=options.max_stack,
        merge=options.merge,
        host_flops=host_flops,
        blueprint_options={name: found for name in names if (found := config.settings_of(name))},
        blend_options={name: found for name in parts if (found := config.settings_of(name))},
    )  # fmt: skip


def build_controller(config: RunConfig, registry: Registry) -> Controller:
    """The run's controller, with its overseers around it."""
    controller: Controller | None = None
    for reference in (config.controller, *config.overseers):
        name, argument = split_reference(reference)
        around = {} if controller is None else {"inner": controller}
        factory = registry.load(registry.find("controller", name))
        if around and "inner" not in inspect.signature(factory).parameters:
            raise BadOption(
                f"controller {name!r} cannot wrap another controller", "an overseer such as emrakul or narset"
            )
        controller = registry.build(
            "controller", name, argument, seed=config.seed, options=options_for(config, registry, "controller", name),
            **around,
        )  # fmt: skip
    assert controller is not None
    return controller


def parse_rewards(references: Iterable[str]) -> dict[str, float]:
    """Weights by term from `accuracy=1`, `rent=0.5`, or `churn` alone, which weighs 1.

    Raises:
        BadOption: an empty name, a repeated one, or a weight that is not a finite number.
    """
    weights: dict[str, float] = {}
    for reference in references:
        name, separator, text = (part.strip() for part in reference.partition("="))
        try:
            weight = float(text) if separator else 1.0
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise BadOption(f"reward {reference!r} cannot be read", "name=weight", "--rewards accuracy=1,rent=1")
        if name in weights:
            raise BadOption(f"reward {name!r} is given twice", "each term once", "--rewards accuracy=1,rent=1")
        weights[name] = weight
    return weights


def build_rewards(config: RunConfig, registry: Registry) -> dict[str, tuple[RewardTerm, float]]:
    """Term and weight of each reward. What a rollback costs is the governor's own `penalty`, in log and reward alike.

    Raises:
        EsperError: see `parse_rewards`; no such reward; or a weight for what the governor's penalty says.
    """
    rewards = {}
    for name, weight in parse_rewards(config.rewards).items():
        factory = registry.load(registry.find("reward", name))
        governed = {}
        if "governor_penalty" in inspect.signature(factory).parameters:
            if weight != 1:
                given = f"reward {name}={weight:g}: what a rollback costs is the governor's penalty"
                raise BadOption(given, f"{name}=1", f"--set governor.penalty={weight:g}")
            governed["governor_penalty"] = part_config(config, "governor", GovernorConfig).penalty
        options = options_for(config, registry, "reward", name)
        rewards[name] = registry.build("reward", name, options=options, **governed), weight
    return rewards


def parse_budget(name: str, text: str, whole: int) -> int | None:
    """`20%` of `whole`, a number such as `50000` or `50_000`, or None for unlimited.

    Raises:
        BadOption: neither.
    """
    if not text:
        return None
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][0-9]+)?)\s*(%?)", text.strip())
    if not match:
        raise BadOption(
            f"{name}={text!r} cannot be read", "a share such as 20% or a number", f"--{name.replace('_', '-')} 20%"
        )
    number = float(match[1].replace("_", ""))
    if number > _LARGEST_BUDGET:
        raise BadOption(
            f"{name}={text!r} is out of bounds", f"at most {_LARGEST_BUDGET:g}", f"--{name.replace('_', '-')} 20%"
        )
    return round(number / 100 * whole) if match[2] else round(number)


class Misfit(BadOption):
    """A host that cannot take the examples of a task."""


def _in_words(inputs: object) -> str:
    """What kind of examples these are."""
    if not isinstance(inputs, torch.Tensor):
        return f"a {type(inputs).__name__}"
    kind = "numbers" if inputs.is_floating_point() else "tokens"
    return f"{kind} of shape {tuple(inputs.shape[1:])}"


def host_flops(host: HostProtocol, task: TaskProtocol, objective: Objective, device: torch.device) -> int:
    """Forward FLOPs of the host for one example of the validation split, on which the objective is checked too.

    Raises:
        EsperError: the host cannot take such examples, or the objective cannot judge its outputs.
    """
    outputs: list[torch.Tensor] = []
    batch = next(iter(task.validation.batches(1, device=str(device))))
    try:
        with evaluating(host.module):
            flops = count_flops(lambda: outputs.append(host.forward_with_slots(batch.head(1).inputs)))
    except Exception as error:  # hosts are plugins, and this is their first call
        what = _in_words(batch.inputs)
        raise Misfit(
            f"cannot take the examples of task {task.name}, which are {what} ({type(error).__name__}: {error})",
            "a host and a task of one kind",
            "leave out --task to use the host's default",
        ) from error
    refuse_misfit(objective, outputs[0], batch.head(1).targets)
    return flops


def compile_host(host: HostProtocol) -> None:
    """Compile the host's blocks for training.

    Raises:
        BadOption: the host does not say what its blocks are.
    """
    compile_blocks = getattr(host, "compile_blocks", None)
    if compile_blocks is None:
        raise BadOption(f"{type(host).__name__} cannot be compiled block by block", "a ModuleHost", "--compile off")
    compile_blocks()


def recompute_host(host: HostProtocol, config: RunConfig) -> None:
    """Have the host's blocks, or half of them, compute their activations again in the backward pass.

    Raises:
        BadOption: the host does not say what its blocks are, or they cannot be computed twice.
    """
    given = f"--recompute {config.recompute}"
    recompute_blocks = getattr(host, "recompute_blocks", None)
    if recompute_blocks is None:
        raise BadOption(f"{given} with {type(host).__name__}", "a ModuleHost", "--recompute off")
    if any(slot.startswith(PREFIX) for slot in config.slots):
        raise BadOption(f"{given} with slots around layers", "slots behind blocks, where nothing runs twice",
                        "--recompute off, or --slots auto")  # fmt: skip
    recompute_blocks(every=2 if config.recompute == "half" else 1)


def make_deterministic(seed: int) -> None:
    """Seed torch and use deterministic algorithms; torch warns where there is none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(seed)
    torch.set_deterministic_debug_mode("warn")  # its twin, use_deterministic_algorithms, imports the compiler: seconds
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, and nothing here reads such memory
    torch.backends.cudnn.benchmark = False
