"""One set-up, one timetable and one training step; no circle of files; what would be ignored is refused."""

from __future__ import annotations

import ast
import collections
import copy
import functools
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from esper_core.leyline.errors import BadOption
from esper_core.leyline.stages import Stage
from esper_core.registry import load_registry
from esper_core.simic.gym.environment import Ground
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.governor import Governor, GovernorConfig
from esper_core.tolaria.run import start_run
from esper_core.tolaria.setup import Setup, check_settings, keep_used_settings, set_up
from esper_core.tolaria.step import Strategy
from esper_core.tolaria.timetable import Timetable
from esper_core.trials.static import train_static

ROOT = Path(__file__).parents[2]
CONFIG = RunConfig(
    host="cnn", task="digits", epochs=1, steps_per_epoch=6, batch_size=32, controller="wait", device="cpu",
    decision_examples=0, decisions_per_epoch=1, blueprints=("conv",),
    settings={"cnn.widths": "4,6", "cnn.norm": "none", "cnn.dropout": 0.0},
)  # fmt: skip


# --- Structure ---


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in ROOT.joinpath("esper_core").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


class Imports(ast.NodeVisitor):
    """The modules of `known` that a file imports, inside functions too; not those for annotations alone."""

    def __init__(self, known: set[str]) -> None:
        self.known, self.found = known, set[str]()

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for part in node.orelse:
                self.visit(part)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names} & self.known

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            self.found |= {whole if whole in self.known else str(node.module)} & self.known


def circles(graph: dict[str, set[str]]) -> list[str]:
    """What is left when files that import nothing that is left are taken away again and again."""
    left = {name: set(targets) - {name} for name, targets in graph.items()}
    while free := {name for name, targets in left.items() if not targets & set(left)}:
        left = {name: targets for name, targets in left.items() if name not in free}
    return sorted(left)


def test_no_files_import_each_other_in_a_circle():
    trees = modules()
    graph = {}
    for name, tree in trees.items():
        visitor = Imports(set(trees))
        visitor.visit(tree)
        graph[name] = visitor.found
    assert len(graph) > 100 and circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]


@functools.cache
def index() -> tuple[dict[str, set[str]], dict[str, list[str]]]:
    """Modules by the names that they call, attributes too, and by the names of functions and classes in them."""
    users, definitions = collections.defaultdict(set), collections.defaultdict(list)
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                users[name].add(module.removeprefix("esper_core."))
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                definitions[node.name].append(module)
    return users, definitions


def users(name: str) -> set[str]:
    """Modules in which `name` is called, or an attribute of that name."""
    return index()[0][name]


def definitions(name: str) -> list[str]:
    return index()[1][name]


def test_set_up_timetable_and_step_are_defined_once():
    for name in ("set_up", "check_settings", "Timetable", "steps_per_epoch", "TrainingStep", "ValidationSlice"):
        assert len(definitions(name)) == 1, name
    assert users("build_host") == {"tolaria.setup", "tolaria.model_file"}  # the other reads a saved model back
    assert users("build_plane") == {"tolaria.setup", "tolaria.model_file"}
    assert users("learning_rate_share") == {"tolaria.timetable"}
    assert users("GradScaler") == {"tolaria.step"}
    assert not {m for m in users("backward") if m.startswith(("tolaria", "trials", "cli", "integrations"))} - {
        "tolaria.step",
        "tolaria.trainer",  # `TrainingStep.backward`, tried again where a seed raises
        "tolaria.flop_budget",  # measures the speed of forward and backward; nothing is updated
    }


def test_a_name_means_one_thing():
    """No two classes share a name, nor two functions that other files of the core may import."""
    found: dict[str, list[str]] = {}
    for folder in ("esper_core", "hosts", "blueprints", "plugins"):
        for path in ROOT.joinpath(folder).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                shared = isinstance(node, ast.FunctionDef) and folder == "esper_core" and not node.decorator_list
                if isinstance(node, ast.ClassDef) or (shared and not node.name.startswith(("_", "esper_"))):
                    found.setdefault(node.name.lstrip("_"), []).append(str(path.relative_to(ROOT)))
    assert len(found) > 500 and {name: where for name, where in found.items() if len(where) > 1} == {}


# --- Refusals ---


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"settings": {"transformers.layers": 2}}, "no effect"),
        ({"settings": {"random.activity": 0.5}}, "no effect"),
        ({"settings": {"regression.loss": "mae"}}, "regression"),
        ({"settings": {"cnn.widhts": "4"}}, "widths"),
        ({"settings": {"nobody.option": 1}}, "unknown part"),
        ({"rewards": ("rent=1", "rent=2")}, "given twice"),
        ({"rewards": ("rent=much",)}, "cannot be read"),
    ],
)
def test_what_would_be_ignored_is_refused(changes: dict[str, Any], named: str):
    with pytest.raises(BadOption, match=named):
        set_up(attrs.evolve(CONFIG, **changes))


@pytest.mark.parametrize(
    "changes", [{"device": "cuda"}, {"overseers": ("emrakul",)}, {"settings": {"cnn.widhts": "4"}}, {"minutes": 1.0}]
)
def test_a_world_that_would_ignore_something_is_refused(changes: dict[str, Any]):
    with pytest.raises(BadOption):
        Ground.lay(attrs.evolve(CONFIG, **changes), load_registry())


def test_settings_of_a_replaced_part_can_be_dropped():
    config, registry = attrs.evolve(CONFIG, controller="random", settings={"random.activity": 0.5}), load_registry()
    check_settings(config, registry)
    other = attrs.evolve(config, controller="wait")
    with pytest.raises(BadOption):
        check_settings(other, registry)
    check_settings(other, registry, lenient=True)
    assert keep_used_settings(other, registry).settings == {}


# --- The step ---


@pytest.mark.parametrize("changes", [{"amp": "bf16"}, {"amp": "bf16", "clip": 0.5, "optimizer": "sgd"}])
def test_a_static_host_is_the_waiting_run_in_any_precision(changes: dict[str, Any]):
    config = attrs.evolve(CONFIG, **changes)
    waited, setup = start_run(config, keep=False), set_up(config)
    static = train_static(setup, setup.timetable.steps)
    assert (static.test_loss, static.validation_loss) == (waited.test_loss, waited.validation_loss)
    assert waited.test_loss != start_run(attrs.evolve(config, amp="off"), keep=False).test_loss


def gradients(setup: Setup, accumulate: int, strategy: Strategy | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    plane = copy.deepcopy(setup.plane)
    alone = attrs.evolve(setup, plane=plane, config=attrs.evolve(setup.config, accumulate=accumulate))
    step = alone.build_step(plane, alone.build_optimizer(), strategy=strategy)
    batch = next(iter(setup.task.train.batches(30)))
    loss = step.backward(batch)
    return loss, torch.cat([p.grad.flatten() for p in plane.host.module.parameters() if p.grad is not None])


@pytest.mark.parametrize("parts", [2, 4, 7])
def test_parts_of_a_batch_add_up_to_the_batch(parts: int):
    setup = set_up(CONFIG)
    whole, split = gradients(setup, 1), gradients(setup, parts)
    assert torch.allclose(whole[0], split[0], atol=1e-6) and torch.allclose(whole[1], split[1], atol=1e-6)


def test_a_strategy_sees_every_part_and_completes_each_step_once():
    class Noted(Strategy):
        def __init__(self) -> None:
            self.seen: list[object] = []

        def backward(self, loss: torch.Tensor, *, last: bool) -> None:
            self.seen.append(last)
            super().backward(loss, last=last)

        def complete(self, parameters: Any) -> None:
            self.seen.append(len(list(parameters)))
            super().complete(parameters)

    strategy, setup = Noted(), set_up(CONFIG)
    gradients(setup, 3, strategy)
    assert strategy.seen == [False, False, True, len(list(setup.plane.host.module.parameters()))]


def test_a_timetable_spreads_decisions_and_samples():
    config = attrs.evolve(CONFIG, epochs=3, decisions_per_epoch=2)
    table = Timetable.of(config, set_up(config).task)
    assert (table.steps, table.decisions, table.due) == (18, 6, frozenset({3, 6}))
    assert table.sensor_interval(4) == 1 and table.ramp_steps(0.08) == 1
    assert table.rate(0.0) < table.rate(0.2) == config.learning_rate > table.rate(0.9) > table.rate(1.0) == 0.0


def test_asking_the_governor_for_its_status_changes_nothing():
    governor = Governor(GovernorConfig(), None)
    before = governor.state_dict()
    assert governor.status([Stage.BLENDING]) == "watching"
    assert governor.state_dict() == before and not governor.tight
    governor.watch([Stage.BLENDING, Stage.PROBATIONARY])
    assert governor.tight == any(stage.spec.tight for stage in (Stage.BLENDING, Stage.PROBATIONARY))
