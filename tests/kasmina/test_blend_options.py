"""Options of combinations and curves take effect: in a run, in its saved model, and in a file of seeds alone."""

from __future__ import annotations

import copy
from pathlib import Path

import attrs
import pytest
import torch

from esper_core import load_growth, save_growth
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import BadOption
from esper_core.tolaria.model_file import load_plane
from esper_core.tolaria.run import start_run
from esper_core.tolaria.setup import set_up
from tests.tolaria import ground

OPTIONS = {"lerp.share": 0.25, "sigmoid.steepness": 2.0}


def plane_with(**settings: float) -> Plane:
    config = ground.config(blueprints=("conv",), blends=("lerp:sigmoid",))
    return set_up(attrs.evolve(config, settings={**config.settings, **settings})).plane


def grow(plane: Plane) -> None:
    plane.germinate("block1", "conv")
    plane.step()
    plane.advance("block1", gated=False)


def answer(plane: Plane) -> torch.Tensor:
    """What the slot passes on of a feature and a seed's delta at alpha 1."""
    combination = plane.slots["block1"].combination
    assert combination is not None
    with torch.no_grad():
        return combination(torch.ones(1, 6, 2, 2), torch.full((1, 6, 2, 2), 3.0), torch.ones(()))


def test_options_of_the_curve_and_of_the_combination_take_effect() -> None:
    plane = plane_with(**OPTIONS)
    twin = copy.deepcopy(plane)
    for each, steepness, share in ((plane_with(), 10.0, 0.5), (plane, 2.0, 0.25), (twin, 2.0, 0.25)):
        grow(each)
        steps, point = each.growths["block1"].ramp_steps, each.slots["block1"].spec
        curve = each.registry.build("blend", "sigmoid", options={"steepness": steepness})
        lerp = each.registry.build("blend", "lerp", point, options={"share": share})
        each.step()
        assert each.growths["block1"].alpha == curve(1 / steps)
        assert torch.equal(answer(each), lerp(torch.ones(1, 6, 2, 2), torch.full((1, 6, 2, 2), 3.0), torch.ones(())))
    assert not torch.equal(answer(plane), answer(plane_with_seed()))


def plane_with_seed() -> Plane:
    plane = plane_with()
    grow(plane)
    return plane


def test_a_saved_model_and_a_file_of_seeds_keep_them(tmp_path: Path) -> None:
    plan = {"decision": 0, "op": "germinate", "slot": "block1", "blueprint": "conv", "tempo": "fast"}
    config = ground.config(
        tmp_path / "run", controller=ground.schedule(tmp_path / "plan.json", plan), blueprints=("conv",),
        blends=("lerp:sigmoid",), settings=OPTIONS, epochs=1,
    )  # fmt: skip
    start_run(config)
    loaded, _ = load_plane(tmp_path / "run")
    save_growth(loaded, tmp_path / "seeds.safetensors")
    other = plane_with()
    load_growth(other, tmp_path / "seeds.safetensors")
    assert torch.equal(answer(loaded), answer(other)) and not torch.equal(answer(loaded), answer(plane_with_seed()))
    assert other.blend_options == {}  # the file's are for the file's seeds


def test_options_of_a_blend_that_the_run_does_not_use_are_refused() -> None:
    config = ground.config(blueprints=("conv",), blends=("residual:cosine",), settings={"sigmoid.steepness": 2.0})
    with pytest.raises(BadOption, match="no effect"):
        set_up(config)
    with pytest.raises(BadOption, match="steepness"):
        start_run(attrs.evolve(config, blends=("sigmoid",), settings={"sigmoid.steepnes": 2.0}), keep=False)
