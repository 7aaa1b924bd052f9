"""A linear seed around a layer becomes part of its weight, exactly within rounding, and can be taken out again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from esper_core.kasmina.allocation import measure_gains
from esper_core.kasmina.around import path_of, resolve_points
from esper_core.kasmina.compose import compose
from esper_core.kasmina.ledger import count_parameters
from esper_core.kasmina.merging import merge_all, merged
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Tempo
from esper_core.leyline.errors import BadFile, BadOption, IllegalCommand
from esper_core.leyline.stages import Op, Stage
from esper_core.testing.blueprint import disturb
from esper_core.testing.cases import installed
from esper_core.tolaria.ema import GrowthEMA
from esper_core.tolaria.model_file import load_growth, save_growth
from tests.kasmina.test_around import CASES, HOSTS, planted


def settle(plane: Plane, *paths: str) -> None:
    """Fossilise seeds, all if none is named, with weights as if they had learned."""
    for path in paths or list(plane.slots):
        while plane.growths[path].stage is not Stage.FOSSILIZED:
            if not plane.step():
                plane.advance(path, gated=False)
        disturb(plane.slots[path].seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{'-'.join(c[1])}-{c[2]}")
def test_merged_seeds_compute_the_same_cost_nothing_and_can_be_taken_out(case: tuple[str, Sequence[str], str]) -> None:
    host, plane, batch = planted(*case)
    settle(plane)
    host.module.eval()
    weights = {name: value.clone() for name, value in host.module.state_dict().items()}
    with torch.no_grad():
        expected = host.forward_with_slots(batch)
        params, flops = plane.ledger.seed_params, plane.ledger.seed_flops
        done, left = merge_all(plane)
        tied = {path for path in left if "uses the same weight" in left[path]}
        assert left.keys() == tied and len(done) == len(plane.slots) - len(tied), left
        assert tied <= {"around:transformer.wte"}
        if done:
            assert any(not torch.equal(value, weights[name]) for name, value in host.module.state_dict().items())
        if not tied:
            assert plane.ledger.seed_params == plane.ledger.seed_flops == 0 < params
            assert not plane.contributing() and all(view.legal == {Op.WAIT} for view in plane.views())
            composed = compose(plane).eval()
            assert count_parameters(composed) == count_parameters(host.module)
            torch.testing.assert_close(composed(batch), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(host.forward_with_slots(batch), expected, rtol=0, atol=1e-5)
        for path in done:
            plane.unmerge(path)
        assert (plane.ledger.seed_params, plane.ledger.seed_flops) == (params, flops)
        torch.testing.assert_close(host.forward_with_slots(batch), expected, rtol=0, atol=1e-5)
        for name, value in host.module.state_dict().items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-5)


def test_what_would_change_the_model_is_refused_and_leaves_it_as_it_was() -> None:
    host, plane, batch = planted("gpt2", ("around:transformer.h.1.mlp.c_fc",), "lora")
    host.module.eval()
    (path,) = plane.slots
    with pytest.raises(IllegalCommand, match="only fossilised"):
        plane.merge(path)
    settle(plane)
    layer = host.module.get_submodule(path_of(path))
    plain = type(layer).forward

    class Doubled(type(layer)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return plain(self, x) + x @ self.weight.tanh()

    layer.__class__ = Doubled
    with torch.no_grad():
        before, weight = host.forward_with_slots(batch), layer.weight.clone()
        with pytest.raises(IllegalCommand, match="would answer otherwise"):
            plane.merge(path)
        assert torch.equal(host.forward_with_slots(batch), before) and torch.equal(layer.weight, weight)
    layer.__class__ = Doubled.__base__
    plane.merge(path)
    with pytest.raises(IllegalCommand, match="merged already"):
        plane.merge(path)
    with pytest.raises(IllegalCommand, match="merged into its layer"):
        plane.wither(path, source="emrakul")
    with pytest.raises(BadOption, match="slots around layers"):
        Plane(HOSTS["gpt2"](), installed(), merge=True)


def test_seeds_live_beside_quantised_layers_and_what_needs_the_weight_is_refused() -> None:
    class Packed(nn.Parameter):
        """A parameter of another class, as the weights of quantised layers are."""

    layers = [nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)]
    for layer in (layers[0], layers[2]):
        layer.weight = Packed(layer.weight.detach(), requires_grad=False)
    host = host_from_module(nn.Sequential(*layers), example=torch.randn(1, 6))
    plane = Plane(host, installed(), points=resolve_points(host, ["around:linear", "head"]))
    first, second = plane.slots
    x = torch.randn(3, 6)
    bare = host.forward_with_slots(x).detach()
    plane.germinate(first, "lora", tempo=Tempo.INSTANT)
    out = host.forward_with_slots(x)
    assert torch.equal(out.detach(), bare)
    out.square().sum().backward()
    assert plane.slots[first].seed.b.weight.grad.any()  # type: ignore[union-attr]
    settle(plane, first)
    with pytest.raises(IllegalCommand, match="computed or quantised"):
        plane.merge(first)
    with pytest.raises(BadOption, match="--allocate activation"):
        measure_gains(plane, lambda: host.forward_with_slots(x).mean(), "need")
    assert measure_gains(plane, lambda: host.forward_with_slots(x).mean(), "activation").keys() == {first, second}


def test_a_plane_merges_what_fossilises_and_files_averages_and_copies_know_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    host = HOSTS["gpt2"]()
    plane = Plane(host, installed(), points=resolve_points(host, ["around:mlp"]), merge=True)
    for path in list(plane.slots)[:3]:
        plane.germinate(path, "dora", tempo=Tempo.INSTANT)
    ema = GrowthEMA(plane, decay=0.5)
    ema.update()
    for path in list(plane.slots)[:2]:
        disturb(plane.slots[path].seed)  # type: ignore[arg-type]
    ema.update()
    host.module.eval()
    tokens = torch.randint(40, (3, 12))
    with torch.no_grad():
        expected, average = host.forward_with_slots(tokens), ema.plane.host.forward_with_slots(tokens)
    for path in list(plane.slots)[:2]:
        while plane.growths[path].stage is not Stage.FOSSILIZED:
            if not plane.step():
                plane.advance(path, gated=False)
    assert merged(plane) == list(plane.slots)[:2] and len(plane.contributing()) == 1
    ema.decay = 1.0
    ema.update()
    twin = copy.deepcopy(plane)
    with torch.no_grad():
        torch.testing.assert_close(host.forward_with_slots(tokens), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ema.plane.host.forward_with_slots(tokens), average, rtol=0, atol=1e-5)
        for path in merged(twin):
            twin.unmerge(path)
        torch.testing.assert_close(twin.host.forward_with_slots(tokens), expected, rtol=0, atol=1e-5)
        save_growth(plane, tmp_path / "growth.safetensors")
        other = HOSTS["gpt2"]()
        again = Plane(other, installed(), points=resolve_points(other, ["around:mlp"]))
        with pytest.raises(BadFile, match="was merged into its layer"):
            load_growth(again, tmp_path / "growth.safetensors")
        other.module.load_state_dict(host.module.state_dict())
        load_growth(again, tmp_path / "growth.safetensors")
        other.module.eval()
        assert merged(again) == merged(plane)
        torch.testing.assert_close(other.forward_with_slots(tokens), expected, rtol=0, atol=1e-5)
        again.unmerge(merged(again)[0])
        torch.testing.assert_close(other.forward_with_slots(tokens), expected, rtol=0, atol=1e-5)
