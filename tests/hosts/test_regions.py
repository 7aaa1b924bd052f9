"""Regions of real architectures: GPT-2, GPT-NeoX and a vision transformer at their own depth, with narrow layers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from esper_core.leyline.host import HostProtocol
from esper_core.narset.regions import chart
from esper_core.registry import load_registry

CONFIGS = {
    "gpt2": {"model_type": "gpt2", "n_layer": 12, "n_embd": 16, "n_head": 2, "vocab_size": 64, "n_positions": 32},
    "gpt_neox": {
        "model_type": "gpt_neox", "num_hidden_layers": 16, "hidden_size": 16, "num_attention_heads": 2,
        "intermediate_size": 32, "vocab_size": 64, "max_position_embeddings": 32,
    },
}  # fmt: skip


def build(name: str, folder: Path) -> HostProtocol:
    registry = load_registry()
    if name not in CONFIGS:
        pytest.importorskip("timm")
        return registry.build("host", "timm", name, outputs=10, input_shape=(3, 32, 32), seed=0)
    pytest.importorskip("transformers")
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]), encoding="utf-8")
    return registry.build("host", "transformers", str(folder), outputs=64, input_shape=(16,), seed=0)


@pytest.mark.parametrize("name", [*CONFIGS, "vit_tiny_patch16_224"])
def test_regions_of_a_real_host_are_of_sensible_size_each_of_one_role_and_a_stretch_of_depth(
    name: str, tmp_path: Path
) -> None:
    specs = sorted(build(name, tmp_path).injection_specs.values(), key=lambda spec: spec.order)
    regions = chart(specs)
    sizes = Counter(regions.values())
    assert len(specs) >= 12 and 3 <= len(sizes) <= len(specs) / 2
    assert min(sizes.values()) >= 2 and max(sizes.values()) <= len(specs) / 2
    for region in sizes:
        members = [spec for spec in specs if regions[spec.name] == region]
        roles = {spec.role for spec in members}
        kin = [spec.name for spec in specs if spec.role in roles]
        first, last = (kin.index(members[at].name) for at in (0, -1))
        assert kin[first : last + 1] == [spec.name for spec in members], f"{region} is no stretch of depth"
