"""Names in files mean what they meant when the file was written, whatever is installed now."""

from __future__ import annotations

import pickle
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from esper_core.kasmina.compose import compose
from esper_core.leyline.errors import BadFile, EsperError, MissingDependency, UnknownName
from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import Option
from esper_core.leyline.specs import BlueprintSpec
from esper_core.registry import Registry, load_registry
from esper_core.storage.tensor_file import read_tensor_file, write_tensor_file
from esper_core.tolaria.grow import accompany
from esper_core.tolaria.model_file import load_growth, load_model, save_growth
from esper_core.tolaria.run import eval_run, resume_run, start_run
from tests.tolaria import ground
from tests.tolaria.test_resume import Interrupter


class Twin(nn.Module):
    """One pointwise convolution, whose answer is scaled: the same weights, another function."""

    scale = 1.0

    def __init__(self, point, width: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(point.channels, point.channels, 1)
        self.width = width

    def forward(self, h):
        return self.scale * self.conv(h) + self.width


class Other(Twin):
    """Weights of the same names and shapes."""

    scale = -3.0


class Wider(Twin):
    """Weights of another shape."""

    def __init__(self, point, width: int = 0) -> None:
        super().__init__(point, width)
        self.conv = nn.Conv2d(point.channels, point.channels, 3, padding=1)


def estimate(point, **options):
    return point.channels * (point.channels + 1), 1


def installed(*packages: tuple[str, str, str, str]) -> Registry:
    """Everything installed, and packages of one blueprint: (distribution, version, name of the blueprint, class)."""
    registry = load_registry()
    for distribution, version, name, kind in packages:
        spec = BlueprintSpec(
            name=name, summary="for tests", factory=f"{__name__}:{kind}", family="convolution", layouts=("NCHW",),
            estimate=f"{__name__}:estimate", sensors=("gradient_norm",),
            options=(Option("width", "int", 0, "added"),),
        )  # fmt: skip
        plugin = SimpleNamespace(esper_blueprints=hookimpl(lambda spec=spec: [spec], specname="esper_blueprints"))
        registry.register(plugin, name=distribution, distribution=distribution, version=version)
    return registry


A = ("dist-a", "1.0", "twin", "Twin")
B = ("dist-b", "2.0", "twin", "Other")
IMPOSTOR = ("impostor", "1.0", "conv", "Other")


def run(folder: Path, registry: Registry, name: str, **changes) -> Path:
    """A finished run in which one seed of that name contributes."""
    controller = ground.schedule(
        folder.with_suffix(".json"),
        {"decision": 0, "op": "germinate", "slot": "block1", "blueprint": name, "tempo": "fast"},
    )
    config = ground.config(folder, controller=controller, blueprints=(name,), **changes)
    assert start_run(config, registry=registry).status == "finished"
    assert any(name.startswith("grown.") for name in load_model(folder, registry=registry).state_dict()), "it grew"
    return folder


@pytest.fixture(scope="module")
def of_conv(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("origin") / "conv", installed(), "conv")


@pytest.fixture(scope="module")
def of_twin(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("origin") / "twin", installed(A), "twin")


def same(one: nn.Module, two: nn.Module) -> bool:
    inputs = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.equal(one(inputs), two(inputs))


def rewritten(folder: Path, target: Path, *without: str) -> Path:
    """The model file as an earlier version wrote it: without these keys of its header."""
    tensors, header = read_tensor_file(folder / "model" / "model.safetensors")
    for key in without:
        header.pop(key)
    write_tensor_file(target, tensors, header)
    return target


def test_another_package_with_a_built_in_name_breaks_no_old_run(of_conv, tmp_path) -> None:
    before, both = load_model(of_conv, registry=installed()), installed(IMPOSTOR)
    assert same(before, load_model(of_conv, registry=both))
    assert same(
        before, load_model(rewritten(of_conv, tmp_path / "old.safetensors", "origins", "probes"), registry=both)
    )
    assert eval_run(of_conv, registry=both) == eval_run(of_conv, registry=installed())


def test_a_name_means_the_package_that_it_meant(of_twin) -> None:
    before = load_model(of_twin, registry=installed(A))
    assert same(before, load_model(of_twin, registry=installed(A, B)))
    with pytest.raises(MissingDependency, match=r"dist-a 1\.0.*dist-b offers another.*pip install 'dist-a==1\.0'"):
        load_model(of_twin, registry=installed(B))
    with pytest.raises(MissingDependency, match=r"not installed; try: pip install 'dist-a==1\.0'"):
        load_model(of_twin, registry=installed())
    with pytest.raises(UnknownName, match=r"dist-a 3\.0 does not offer it"):
        load_model(of_twin, registry=installed(("dist-a", "3.0", "twig", "Twin")))


def test_a_changed_implementation_is_told(of_twin) -> None:
    told = r"dist-a was 1\.0 and is 2\.0 here.*pip install 'dist-a==1\.0'"
    with pytest.raises(BadFile, match=rf"twin at block1.*{told}"):
        load_model(of_twin, registry=installed(("dist-a", "2.0", "twin", "Other")))
    with pytest.raises(BadFile, match=told):
        load_model(of_twin, registry=installed(("dist-a", "2.0", "twin", "Wider")))
    with pytest.raises(BadFile, match="compute something else"):
        load_model(of_twin, registry=installed(("dist-a", "1.0", "twin", "Other")))
    assert same(
        load_model(of_twin, registry=installed(A)),
        load_model(of_twin, registry=installed(("dist-a", "2.0", "twin", "Twin"))),
    )


@pytest.mark.parametrize("every", [False, True], ids=["named", "every blueprint that fits"])
def test_a_run_is_resumed_with_the_parts_that_it_began_with(tmp_path, every) -> None:
    """Whatever was installed meanwhile, even where the run may grow anything that fits."""
    controller = ground.schedule(tmp_path / "plan.json", {"decision": 1, "op": "germinate", "slot": "block1",
                                                          "blueprint": "conv", "tempo": "fast"})  # fmt: skip
    blueprints = () if every else ("conv",)
    configs = [ground.config(tmp_path / n, controller=controller, blueprints=blueprints) for n in ("whole", "broken")]
    start_run(configs[0], registry=installed())
    stop = Interrupter(signal.SIGTERM, 6)
    assert start_run(configs[1], {"stop": stop}, registry=installed()).status == "interrupted"
    assert resume_run(tmp_path / "broken", registry=installed(IMPOSTOR)).status == "finished"
    assert ground.fingerprint(tmp_path / "broken") == ground.fingerprint(tmp_path / "whole")


def test_a_run_whose_package_is_gone_is_not_resumed(tmp_path) -> None:
    config = ground.config(tmp_path / "run", blueprints=("twin", "conv"))
    start_run(config, {"stop": Interrupter(signal.SIGTERM, 6)}, registry=installed(A))
    with pytest.raises(MissingDependency, match=r"pip install 'dist-a==1\.0'"):
        resume_run(tmp_path / "run", registry=installed(B))
    told: list[str] = []
    changed = installed(("dist-a", "1.1", "twin", "Twin"))
    with pytest.raises(BadFile, match=r"twin \(was dist-a 1\.0"):
        resume_run(tmp_path / "run", registry=changed)
    again = resume_run(tmp_path / "run", registry=changed, notify=told.append, accept_changes=True)
    assert again.status == "finished" and any("dist-a 1.1" in line for line in told)


def test_seeds_of_another_model_are_bound_alike(tmp_path) -> None:
    def beside(registry: Registry, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sample = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        return accompany(model, optimizer, sample, steps=8, registry=registry, budget_params="", **options).plane

    plane = beside(installed(A), settings={"twin.width": 2})
    path = next(iter(plane.slots))
    plane.germinate(path, "twin")
    plane.advance(path, gated=False)
    plane.advance(path, gated=False)
    for _ in range(9):
        plane.step()
    save_growth(plane, tmp_path / "growth.safetensors")
    other = beside(installed(A, B), blueprints=["conv"])
    load_growth(other, tmp_path / "growth.safetensors")
    inputs = torch.randn(4, 1, 8, 8)
    assert torch.equal(compose(plane).eval()(inputs), compose(other).eval()(inputs)), "its options come with it"
    with pytest.raises(MissingDependency, match="dist-a"):
        load_growth(beside(installed(B), blueprints=["conv"]), tmp_path / "growth.safetensors")


def test_a_bound_registry_travels(of_twin) -> None:
    from esper_core.registry.origin import Origins

    origins = Origins.read({"blueprint": {"conv": {"distribution": "nobody", "version": "1"}}})
    copy = pickle.loads(pickle.dumps(load_registry().bound(origins)))
    with pytest.raises(EsperError, match="nobody 1, which is not installed"):
        copy.find("blueprint", "conv")
    assert load_registry().find("blueprint", "conv").distribution == "esper-core"
