"""Muon for the matrices inside a network, AdamW for everything else, as one optimizer.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the scale that lets Muon share
AdamW's learning rate and weight decay is from Liu et al., "Muon is Scalable for LLM Training", 2025, arXiv:2502.16982.
`torch.optim.Muon` computes the same update one matrix at a time and takes matrices only; here all matrices of one shape
are orthogonalized together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
_ITERATIONS: Final = 5


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose matrices are updated by Muon.

    Args:
        params: parameters or param groups, as for every torch optimizer.
        is_matrix: whether a parameter is updated by Muon; it must then be two-dimensional.
        momentum: of Muon (Nesterov).
        adamw: arguments of `torch.optim.AdamW`; `lr` and `weight_decay` hold for the matrices, too.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        is_matrix: Callable[[Tensor], bool],
        momentum: float = 0.95,
        **adamw: Any,
    ) -> None:
        self.is_matrix, self.momentum = is_matrix, momentum
        super().__init__(params, **adamw)
        self._step_supports_amp_scaling = False  # a gradient scaler then skips a step with infinities as a whole

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        matrices = [
            [p for p in group["params"] if p.grad is not None and self.is_matrix(p)] for group in self.param_groups
        ]
        gradients = {p: p.grad for group in matrices for p in group}
        for parameter in gradients:
            parameter.grad = None
        try:
            answer: float | None = super().step(closure)
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
        for group, chosen in zip(self.param_groups, matrices, strict=True):
            self._update(group, chosen)
        return answer

    @torch.no_grad()
    def _update(self, group: Mapping[str, Any], parameters: list[nn.Parameter]) -> None:
        shapes: dict[tuple[object, ...], list[Tensor]] = {}
        for parameter in parameters:
            shapes.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
        for same in shapes.values():
            gradients = [p.grad for p in same if p.grad is not None]
            for matrix in same:
                state = self.state[matrix]
                if "momentum_buffer" not in state:  # the count is there because AdamW expects one in every state
                    state.update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(matrix))
                state["step"] += 1
            momenta = [self.state[p]["momentum_buffer"] for p in same]
            torch._foreach_lerp_(momenta, gradients, 1.0 - self.momentum)
            directions = orthogonalize(torch.stack(list(torch._foreach_lerp(gradients, momenta, self.momentum))))
            scale = 0.2 * math.sqrt(max(same[0].shape))
            torch._foreach_mul_(same, 1.0 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, list(directions.to(same[0].dtype).unbind(0)), alpha=-group["lr"] * scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, by a Newton-Schulz iteration.

    Args:
        matrices: (N, rows, columns).

    Returns:
        (N, rows, columns) with singular values near 1; bfloat16 on a GPU, else of the dtype of `matrices`.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return torch.transpose(x, -2, -1) if tall else x


def hidden_matrices(module: nn.Module, run: Callable[[], object] | None = None) -> frozenset[int]:
    """The `id`s of the parameters of `module` that Muon updates: the weights of linear layers inside the network.

    Embeddings are left out, and so are the last linear layer, which is the head, and weights that these share.

    Args:
        run: runs `module` once, which tells the layer that is last; without it, the one that is registered last.
    """
    layers = [m for m in module.modules() if getattr(m, "weight", None) is not None]
    matrices = [m for m in layers if isinstance(m.weight, nn.Parameter) and m.weight.dim() == 2]
    embeddings = {id(m.weight) for m in matrices if isinstance(m, nn.Embedding)}
    linear = [m for m in matrices if not isinstance(m, nn.Embedding)]
    last = (_in_order(linear, run) if run is not None else []) or linear
    head = {id(last[-1].weight)} if last else set()
    return frozenset(id(m.weight) for m in linear) - head - embeddings


def _in_order(layers: Iterable[nn.Module], run: Callable[[], object]) -> list[nn.Module]:
    """The layers that `run` calls, as often as they are called, in the order in which they are done."""
    order: list[nn.Module] = []
    handles = [layer.register_forward_hook(lambda layer, args, output: order.append(layer)) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return order
