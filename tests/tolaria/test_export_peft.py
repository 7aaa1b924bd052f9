"""An adapter that was written for peft gives the same logits there, at any ranks, places and alphas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from esper_core.kasmina.around import resolve_points
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Tempo
from esper_core.leyline.errors import EsperError
from esper_core.testing.blueprint import disturb
from esper_core.testing.cases import installed
from esper_core.tolaria.export_peft import compare_with_peft, write_peft
from tests.kasmina.test_around import HOSTS

pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("name", "words"), [("gpt2", ("around:mlp", "attn")), ("gpt2", ("around:q", "v")), ("bert", ("around:all",))]
)
def test_peft_gives_the_same_logits(name: str, words: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    host = HOSTS[name]()
    plane = Plane(host, installed(), points=resolve_points(host, words))
    for number, path in enumerate(plane.slots):
        plane.germinate(path, "lora", tempo=Tempo.INSTANT, options={"rank": 1 + number % 3, "strength": 2.0})
        disturb(plane.slots[path].seed)  # type: ignore[arg-type]
    plane._set_alpha(path, 0.5)
    before = host.module.state_dict()
    ranks = write_peft(plane, tmp_path)
    batch = torch.randint(40, (3, 12))
    difference, examples = compare_with_peft(plane, tmp_path, batch)
    assert difference <= 1e-5 and examples == 3
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == max(ranks.values())
    assert all(torch.equal(value, host.module.state_dict()[key]) for key, value in before.items())
    with torch.no_grad():
        for slot in plane.slots.values():
            slot.seed.b.weight.zero_()  # type: ignore[union-attr]
    assert compare_with_peft(plane, tmp_path, batch)[0] > 1e-3, "the comparison sees an adapter that differs"


def test_what_peft_cannot_hold_is_refused(tmp_path: Path) -> None:
    host = HOSTS["gpt2"]()
    plane = Plane(host, installed(), points=resolve_points(host, ["around:mlp"]))
    with pytest.raises(EsperError, match="no seed around a layer"):
        write_peft(plane, tmp_path)
    plane.germinate(next(iter(plane.slots)), "ia3", tempo=Tempo.INSTANT)
    with pytest.raises(EsperError, match="peft's LoRA"):
        write_peft(plane, tmp_path)
