"""The agent as a product: its file, its lineage, its adapters, and the controller that decides with it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import attrs
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esper_core.leyline.errors import BadFile, BadOption, EsperError, UnknownName
from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.specs import AdapterSpec
from esper_core.registry import load_registry
from esper_core.tamiyo.adapter import Adapter, activate, build_adapter, load_adapter, merge_adapter
from esper_core.tamiyo.core import CoreConfig, Decision, TamiyoCore
from esper_core.tamiyo.learned import LearnedController
from esper_core.tamiyo.observation import collate, observe

from .views import BLENDS, make_view

SMALL = CoreConfig(width=16, layers=1, heads=2)


def trained(seed: int = 0, config: CoreConfig | None = None) -> TamiyoCore:
    """A core whose normalisers have seen something, so that they are worth saving."""
    core = TamiyoCore(config, seed=seed)
    for key in range(12):
        core.normalisers["run"].update(collate([observe(make_view(key), BLENDS)]).run)
    core.lineage = {"curriculum": "test", "seed": seed}
    return core


def answer(core: TamiyoCore) -> Decision:
    return core.decide(collate([observe(make_view(k, 4), BLENDS) for k in range(6)]), core.initial(6))


def equal(one: Decision, two: Decision) -> bool:
    return (
        torch.equal(one.actions, two.actions)
        and torch.equal(one.value, two.value)
        and torch.equal(one.log_prob, two.log_prob)
    )


def shaken(adapter: Adapter, seed: int = 0) -> Adapter:
    """As if trained: every parameter is something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


def test_a_reloaded_core_decides_the_same_bits_and_knows_its_lineage(tmp_path: Path) -> None:
    core = trained()
    core.save(tmp_path / "core.safetensors")
    again = TamiyoCore.load(tmp_path / "core.safetensors")
    assert again.fingerprint == core.fingerprint and again.lineage == core.lineage
    assert equal(answer(core), answer(again))


def test_a_file_that_was_touched_is_refused(tmp_path: Path) -> None:
    core = trained(config=SMALL)
    core.save(tmp_path / "core.safetensors")
    data = bytearray((tmp_path / "core.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "core.safetensors").write_bytes(data)
    with pytest.raises(BadFile, match="fingerprint"):
        TamiyoCore.load(tmp_path / "core.safetensors")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), noise=st.binary(min_size=1, max_size=40))
@example(cut=1.0, noise=b"\x00")  # bytes behind the last tensor
def test_damage_gives_one_clear_error(tmp_path: Path, cut: float, noise: bytes) -> None:
    path = tmp_path / "core.safetensors"
    if not (tmp_path / "whole").exists():
        trained(config=SMALL).save(tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    at = int(cut * len(data))
    path.write_bytes(data[:at] + noise + data[at + len(noise) + 1 :])
    with pytest.raises(EsperError):
        TamiyoCore.load(path)


def test_another_feature_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(config=SMALL).save(tmp_path / "core.safetensors")
    monkeypatch.setattr("esper_core.tamiyo.agent_file.schema", lambda: ["slots.something else"])
    with pytest.raises(BadFile, match="features"):
        TamiyoCore.load(tmp_path / "core.safetensors")


# --- Adapters ---


def test_lora_starts_silent_is_small_and_leaves_exactly() -> None:
    core = trained()
    before, state = answer(core), {k: v.clone() for k, v in core.state_dict().items()}
    adapter = core.attach(build_adapter(core, "lora", "vision"))
    whole = sum(p.numel() for p in core.parameters())
    assert 0 < sum(p.numel() for p in adapter.parameters()) <= 0.02 * whole
    assert equal(before, answer(core))  # the delta is zero at birth
    shaken(adapter)
    assert not equal(before, answer(core))
    assert not any(p.requires_grad for p in core.parameters())
    core.detach("vision")
    assert equal(before, answer(core)) and all(p.requires_grad for p in core.parameters())
    assert all(torch.equal(v, state[k]) for k, v in core.state_dict().items())


def test_several_domains_side_by_side_and_the_active_one_speaks() -> None:
    core = trained()
    bare = answer(core)
    vision = shaken(build_adapter(core, "lora", "vision"), 1)
    language = shaken(build_adapter(core, "lora", "language"), 2)
    core.attach(vision)
    seen = answer(core)
    core.attach(language)
    read = answer(core)
    assert not equal(seen, read)
    activate(core, "vision")
    assert equal(answer(core), seen)
    activate(core, None)
    assert equal(answer(core), bare)
    activate(core, "language")
    core.detach("language")
    assert equal(answer(core), seen)  # the one that is left speaks
    with pytest.raises(UnknownName, match="biology"):
        activate(core, "biology")


def test_files_of_adapters_know_their_core(tmp_path: Path) -> None:
    core, other = trained(), trained(seed=1)
    adapter = shaken(build_adapter(core, "lora", "vision"))
    adapter.lineage = {"steps": 3}
    adapter.save(tmp_path / "vision.safetensors")
    core.attach(adapter)
    expected = answer(core)
    core.detach()
    loaded = core.attach(Adapter.load(tmp_path / "vision.safetensors"))
    assert equal(answer(core), expected) and loaded.lineage == {"steps": 3}
    with pytest.raises(BadFile, match="was trained on core"):
        other.attach(Adapter.load(tmp_path / "vision.safetensors"))
    with pytest.raises(BadFile, match="belongs to core"):
        other.attach(adapter)
    with pytest.raises(BadFile, match="no adapter"):
        core.save(tmp_path / "core.safetensors")
        load_adapter(tmp_path / "core.safetensors")


def test_five_adapters_load_quickly(tmp_path: Path) -> None:
    core = trained()
    for k in range(5):
        shaken(build_adapter(core, "lora", f"domain{k}"), k).save(tmp_path / f"{k}.safetensors")
    load_registry()
    started = time.process_time()
    for k in range(5):
        core.attach(load_adapter(tmp_path / f"{k}.safetensors"))
    assert (time.process_time() - started) / 5 < 0.25  # the figure is in docs; this only catches a blunder
    assert list(core.adapters) == [f"domain{k}" for k in range(5)]


def test_a_merged_core_answers_as_core_and_adapter_did(tmp_path: Path) -> None:
    core = trained()
    core.attach(shaken(build_adapter(core, "lora", "vision")))
    merged = merge_adapter(core, "vision")
    ours, theirs = answer(core), answer(merged)
    assert torch.equal(ours.actions, theirs.actions) and torch.allclose(ours.value, theirs.value, atol=1e-5)
    assert merged.fingerprint != core.fingerprint and merged.lineage["merged"]["core"] == core.fingerprint
    merged.save(tmp_path / "merged.safetensors")
    assert TamiyoCore.load(tmp_path / "merged.safetensors").lineage == merged.lineage


class Shift(Adapter):
    """Another kind: a constant added to one head's output."""

    def __init__(self, core: TamiyoCore) -> None:
        super().__init__(core, "shift")
        self.targets = ("op_head",)
        self.shift = nn.Parameter(torch.zeros(core.op_head.out_features))

    def delta(self, target: str, inputs: Tensor) -> Tensor:
        return self.shift.expand(*inputs.shape[:-1], -1)


class ShiftPlugin:
    @hookimpl
    def esper_adapters(self) -> list[AdapterSpec]:
        return [AdapterSpec(name="shift", summary="a constant on the operations", factory=f"{__name__}:Shift")]


def test_another_kind_of_adapter_is_a_plugin_away(tmp_path: Path) -> None:
    registry = load_registry()
    registry.register(ShiftPlugin(), name="shift")
    core = trained(config=SMALL)
    adapter = shaken(build_adapter(core, "shift", "vision", registry=registry))
    adapter.save(tmp_path / "shift.safetensors")
    again = load_adapter(tmp_path / "shift.safetensors").build(core, registry)
    assert torch.equal(again.shift, adapter.shift)
    core.attach(again)
    with pytest.raises(NotImplementedError, match="shift"):
        merge_adapter(core, "vision")


# --- The controller ---


def test_the_controller_decides_the_same_after_reload_and_resume(tmp_path: Path) -> None:
    core = trained()
    with torch.no_grad():
        core.op_head.bias[0] -= 3.0  # act more, so that there is something to compare
    core.save(tmp_path / "core.safetensors")
    views = [make_view(k, 3, k) for k in range(10)]
    for sample in (False, True):
        whole = LearnedController(str(tmp_path / "core.safetensors"), seed=1, sample=sample)
        expected = [list(whole.decide(view)) for view in views]
        assert any(expected)
        first = LearnedController(str(tmp_path / "core.safetensors"), seed=1, sample=sample)
        begun = [list(first.decide(view)) for view in views[:4]]
        state = json.loads(json.dumps(first.state_dict()))
        second = LearnedController(str(tmp_path / "core.safetensors"), seed=9, sample=sample)
        second.load_state_dict(state)
        assert begun + [list(second.decide(view)) for view in views[4:]] == expected
    stranger = LearnedController(core=trained(seed=3))
    with pytest.raises(BadOption, match="same agent file"):
        stranger.load_state_dict(state)


def test_commands_are_legal_and_the_last_decision_waits() -> None:
    controller = LearnedController(core=trained(), sample=True)
    for k in range(20):
        view = make_view(k, 4, 5)
        for command in controller.decide(view):
            slot = next(s for s in view.slots if s.path == command.slot)
            assert command.op in slot.legal
            assert not command.blueprint or command.blueprint in {b.name for b in slot.blueprints}
            assert not command.blend or command.blend in view.blends
    assert not controller.decide(attrs.evolve(make_view(1, 4, 5), decision=11))


def test_an_adapter_speaks_through_the_controller(tmp_path: Path) -> None:
    core = trained()
    core.save(tmp_path / "core.safetensors")
    adapter = build_adapter(core, "lora", "vision")
    shaken(adapter).save(tmp_path / "vision.safetensors")
    bare = LearnedController(str(tmp_path / "core.safetensors"))
    adapted = LearnedController(str(tmp_path / "core.safetensors"), adapter=str(tmp_path / "vision.safetensors"))
    view = make_view(2, 3, 2)
    bare.decide(view)
    adapted.decide(view)
    assert not torch.equal(bare.hidden, adapted.hidden)
