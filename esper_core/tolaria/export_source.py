"""A traced program as Python source that needs nothing but torch and safetensors."""

from __future__ import annotations

import copy
import keyword
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind

from esper_core.leyline.errors import EsperError

_TEMPLATE: Final = '''\
"""A grown model, written by Esper. Needs torch and safetensors only.

    from model import load
    model = load()                  # reads model.safetensors beside this file
    logits = model({inputs})

It computes what the grown model computes in eval mode; its weights are parameters and can be trained on.
"""

from math import inf, nan
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import device, nn

PARAMETERS = {parameters}
BUFFERS = {buffers}


class Model(nn.Module):
    """Takes {inputs} with the batch first, and returns logits."""

    def __init__(self, tensors):
        super().__init__()
        for name, key in PARAMETERS.items():
            self.register_parameter(name, nn.Parameter(tensors[key], requires_grad=tensors[key].is_floating_point()))
        for name, key in BUFFERS.items():
            self.register_buffer(name, tensors[key])

    def forward(self, {inputs}):
        return _compute({arguments})[0]


def load(path=Path(__file__).with_name("model.safetensors")):
    """The model with the weights in `path`, on the CPU."""
    return Model(load_file(path)).eval()


{code}'''


def write_source(program: torch.export.ExportedProgram, names: Sequence[str]) -> tuple[str, dict[str, Tensor]]:
    """The source of `model.py`, and the tensors that it loads.

    Args:
        names: of the inputs, in order; the model's `forward` takes them by these names where Python allows all of them.

    Raises:
        EsperError: the program calls other programs, which plain source cannot show.
    """
    graph = copy.deepcopy(program.graph_module).graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # would tie the source to one device
            graph.erase_node(node)
    if any(node.op in ("get_attr", "call_module") for node in graph.nodes):
        raise EsperError("this model's program has parts of its own", "a single program", "--format torch-export")
    if program.graph_signature.buffers_to_mutate:
        raise EsperError("this model changes its buffers while it predicts", "a model in eval mode")
    parameters: dict[str, str] = {}
    buffers: dict[str, str] = {}
    inputs: list[str] = []
    arguments: list[str] = []
    tensors: dict[str, Tensor] = {}
    allowed = all(
        one.isidentifier() and not keyword.iskeyword(one) and one not in ("self", "_compute") for one in names
    )
    for spec in program.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(names[len(inputs)] if allowed else name)
            arguments.append(inputs[-1])
            continue
        key = str(spec.target)
        stored = program.state_dict.get(key, program.constants.get(key))
        if not isinstance(stored, Tensor):
            raise EsperError(f"this model holds {key}, which is no tensor", "tensors", "--format torch-export")
        (parameters if spec.kind is InputKind.PARAMETER else buffers)[name] = key
        tensors[key] = stored.detach().cpu().clone().contiguous()
        arguments.append(f"self.{name}")
    code = graph.python_code("self").src.strip().replace("def forward(self, ", "def _compute(", 1)
    source = _TEMPLATE.format(
        inputs=", ".join(inputs), arguments=", ".join(arguments), code=code + "\n",
        parameters=_table(parameters), buffers=_table(buffers),
    )  # fmt: skip
    return source, tensors


def _table(names: dict[str, str]) -> str:
    return "{\n" + "".join(f"    {name!r}: {key!r},\n" for name, key in names.items()) + "}"
