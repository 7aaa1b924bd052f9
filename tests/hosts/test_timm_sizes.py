"""A vision transformer of timm takes depth, width, heads and patches; a model that has no such thing says so."""

from __future__ import annotations

import pytest

pytest.importorskip("timm")

from esper_core.leyline.errors import BadOption
from esper_hosts.timm import timm

IMAGES = {"outputs": 10, "input_shape": (1, 28, 28)}


def test_a_vision_transformer_of_a_chosen_size() -> None:
    host = timm("vit_tiny_patch16_224", **IMAGES, depth=2, embed_dim=64, num_heads=2, patch_size=4, resize="none")
    assert {"blocks.0", "blocks.1"} <= set(host.injection_specs) and "blocks.2" not in host.injection_specs
    assert {spec.channels for spec in host.injection_specs.values()} == {64}
    assert host.module.patch_embed.grid_size == (7, 7)


@pytest.mark.parametrize(("name", "option", "told"), [
    ("resnet18", {"depth": 3}, "timm:resnet18 cannot be built with timm.depth=3"),
    ("vit_tiny_patch16_224", {"embed_dim": 65}, "timm.embed_dim=65"),
])  # fmt: skip
def test_sizes_that_cannot_be(name: str, option: dict[str, int], told: str) -> None:
    with pytest.raises(BadOption, match=told):
        timm(name, **IMAGES, **option)
