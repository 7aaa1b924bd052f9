"""Low-rank seeds around layers as an adapter that `peft` loads: adapter_config.json and adapter_model.safetensors.

Scales and alpha are multiplied into B, so that peft's own scale is 1 everywhere; seeds stacked upon one layer, and
those at parts of one, become one adapter of their ranks' sum.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from esper_core.kasmina.around import path_of
from esper_core.kasmina.modes import evaluating
from esper_core.kasmina.module_copy import copy_module
from esper_core.kasmina.module_host import ModuleHost
from esper_core.kasmina.paths import base_of
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.plane_hooks import drop_hooks, plane_hooks
from esper_core.leyline.errors import EsperError
from esper_core.leyline.stages import STAGES

if TYPE_CHECKING:
    from esper_core.leyline.host import Inputs

_PREFIX = "base_model.model."


def write_peft(plane: Plane, folder: Path, base: str = "") -> dict[str, int]:
    """Write the seeds of a plane for `peft`.

    Args:
        folder: is made if need be. base: name or folder of the model that they were grown on.

    Returns:
        Ranks by path of the layer.

    Raises:
        EsperError: nothing has grown, or a seed is no low-rank update around a linear layer.
    """
    tensors: dict[str, Tensor] = {}
    downs: dict[str, list[Tensor]] = {}
    ups: dict[str, list[Tensor]] = {}
    transposed = False
    for path, slot in plane.slots.items():
        if not STAGES[slot.stage].contributes or float(slot.alpha) == 0:
            continue
        layer, (down, up) = slot.spec.layer, _matrices(plane, path)
        assert layer is not None
        place = path_of(base_of(path))
        full = plane.host.module.get_submodule(place).weight
        assert isinstance(full, Tensor)
        outputs = full.shape[1] if layer.transposed else full.shape[0]
        whole = up.new_zeros(outputs, up.shape[1])
        whole[layer.start : layer.start + layer.outputs] = up
        downs.setdefault(place, []).append(down)
        ups.setdefault(place, []).append(whole)
        transposed |= layer.transposed
    if not downs:
        raise EsperError("no seed around a layer acts in the model", "a run with --slots around:… --blueprints lora")
    for place in downs:
        tensors[f"{_PREFIX}{place}.lora_A.weight"] = torch.cat(downs[place]).cpu().contiguous()
        tensors[f"{_PREFIX}{place}.lora_B.weight"] = torch.cat(ups[place], 1).cpu().contiguous()
    ranks = {place: sum(len(down) for down in found) for place, found in downs.items()}
    largest = max(ranks.values())
    others = {place: rank for place, rank in ranks.items() if rank != largest}
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base, "r": largest, "lora_alpha": largest,
        "rank_pattern": others, "alpha_pattern": others, "target_modules": list(ranks), "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": transposed, "inference_mode": True, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return ranks


def _matrices(plane: Plane, path: str) -> tuple[Tensor, Tensor]:
    """A, (rank, inputs), and B, (outputs, rank), whose product the seed at a path adds to its layer's weight."""
    slot, growth = plane.slots[path], plane.growths[path]
    seed: Any = slot.seed
    fits = growth.blueprint.rpartition("/")[2] == "lora" and growth.blend.startswith("residual:")
    if slot.spec.layer is None or slot.spec.layer.kind != "linear" or not fits:
        raise EsperError(
            f"the seed at {path} ({growth.blueprint}, {growth.blend}) is nothing that peft's LoRA could hold",
            "lora around linear layers, blended by residual",
            "--format torch",
        )
    with torch.no_grad():
        return seed.a.weight.clone(), seed.b.weight * (seed.scale * float(slot.alpha))


def compare_with_peft(plane: Plane, folder: Path, inputs: Inputs) -> tuple[float, int]:
    """How far what `peft` makes of the adapter in `folder` is from the model with its slots, over some examples.

    Returns:
        Largest absolute difference of logits, and the number of examples.

    Raises:
        EsperError: the host is no module that could be wrapped.
    """
    host = plane.host
    if not isinstance(host, ModuleHost):
        raise EsperError(f"a {type(host).__name__} cannot be wrapped by peft", "a host made of one module")
    model = copy_module(host.module, {id(hook): None for hook in plane_hooks(host.module)})
    drop_hooks(model)
    with torch.no_grad(), evaluating(host.module):
        expected = host.forward_with_slots(inputs)
        loaded = import_module("peft").PeftModel.from_pretrained(model.eval(), str(folder)).eval()
        found = host.logits_of(loaded, inputs)
    return float((found - expected).abs().max()), len(expected)
