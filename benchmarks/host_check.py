"""What every host must pass in a sweep: points, identity while dormant and while isolated, a seed that trains."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esper_core.kasmina.compose import compose
from esper_core.kasmina.module_host import ModuleHost
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Command
from esper_core.leyline.errors import IllegalCommand
from esper_core.leyline.stages import Op, Stage
from esper_core.registry import Registry, load_registry

WILD, WIDER = 1e6, 8
"""Batch norms over two values each give no gradient, or one above the first; then so many examples are taken."""

SEEDS = {"NCHW": "depthwise", "NHWC": "depthwise", "NLD": "bottleneck_adapter"}


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Marks what is raised inside with the name of the stage."""
    try:
        yield
    except BaseException as error:
        if not hasattr(error, "stage"):
            error.stage = name  # type: ignore[attr-defined]
        raise


@functools.cache
def ready_registry() -> Registry:
    """The registry, loaded once a process; in a bare checkout without entry points, the plugins are named here."""
    registry = load_registry()
    if not registry.specs("blueprint"):
        import esper_blueprints.plugin
        import esper_plugins.blends.plugin

        registry.register(esper_blueprints.plugin, name="blueprints", distribution="esper-core")
        registry.register(esper_plugins.blends.plugin, name="blends", distribution="esper-core")
    return registry


def check_host(host: ModuleHost, inputs: Any) -> dict[str, Any]:
    """Attach a plane, compare outputs bit for bit, germinate a seed in the middle and train it for one step.

    Args:
        host: fresh from the discovery of its points.
        inputs: a batch of two.

    Returns:
        Number of points, their layouts and roles, where the seed grew, and the host's parameters.
    """
    specs = list(host.injection_specs.values())
    wake(host.module)
    for parameter in host.module.parameters():
        parameter.requires_grad_(False)
    host.module.eval()
    with stage("identity"), torch.no_grad():
        bare = _repeatable(host, inputs)
        plane = Plane(host, ready_registry())
        _same(bare, _seeded(host, inputs), "dormant slots change the output")
    with stage("germination"):
        spec = specs[len(specs) // 2]
        plane.germinate(spec.name, SEEDS[spec.layout])
        while plane.slots[spec.name].stage.value != "training":
            if not plane.step():
                plane.advance(spec.name, gated=False)
    with stage("isolation"), torch.no_grad():
        _same(bare, _seeded(host, inputs), "an isolated seed changes the output")
    with stage("training"):
        parameters = plane.seed_groups()[spec.name]
        before = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        host.module.train()
        _loss(host.forward_with_slots(inputs)).backward()
        if isinstance(inputs, Tensor) and not 0 < _steepest(parameters) < WILD:
            optimizer.zero_grad()
            _loss(host.forward_with_slots(torch.randn(WIDER, *inputs.shape[1:]))).backward()
        missing = [i for i, p in enumerate(parameters) if p.grad is None]
        if missing:
            raise AssertionError(f"{len(missing)} of {len(parameters)} parameters of the seed have no gradient")
        if not any(bool(p.grad.any()) for p in parameters if p.grad is not None):
            raise AssertionError("the seed's gradient is zero")
        optimizer.step()
        if all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True)):
            raise AssertionError("the seed did not move")
        if not all(bool(p.isfinite().all()) for p in parameters):
            raise AssertionError("the seed is not finite after a step")
    with stage("copy"), torch.no_grad():
        plane.cull(spec.name, gated=False)
        for _ in range(plane.embargo_decisions + 1):
            plane.decide()
        copied = check_copy(plane, inputs)
    return {
        **copied,
        "points": len(specs),
        "layouts": sorted({s.layout for s in specs}),
        "roles": sorted({s.role for s in specs}),
        "causal": any("causal" in s.tags for s in specs),
        "seed_at": spec.name,
        "params": sum(p.numel() for p in host.module.parameters()),
    }


def check_copy(plane: Plane, inputs: Any) -> dict[str, Any]:
    """Clone the deepest block that can be, alone and with all that it follows; or tell why none can.

    Returns:
        `copied`: how many blocks; 0 with `no_copy`, the reason that the last point has.
    """
    host, reason = plane.host, ""
    host.module.eval()
    bare = _seeded(host, inputs)
    for path in reversed([path for path, slot in plane.slots.items() if slot.seed is None]):
        for blocks in ("all", "1"):
            command = Command(Op.GERMINATE, path, "copy", options={"blocks": blocks})
            try:
                plane.apply(command)
            except IllegalCommand as error:
                reason = reason or str(error)
                continue
            _same(bare, _seeded(host, inputs), "a copy at alpha 0 changes the output")
            while plane.growths[path].stage is Stage.BLENDING:
                plane.step()
            grown = _seeded(host, inputs)
            if not grown.isfinite().all():
                raise AssertionError("a copy at alpha 1 is not finite")
            torch.manual_seed(0)
            torch.testing.assert_close(compose(plane)(inputs), grown)
            return {"copied": len(plane.growths[path].origins)}
    return {"copied": 0, "no_copy": reason}


@torch.no_grad()
def wake(model: nn.Module) -> None:
    """Give weights that are nothing but zeros some noise, as the model's first own step would.

    Some models start with such a classifier, or scale each block by zero, and then no gradient gets before it.
    """
    for name, parameter in model.named_parameters():
        if (parameter.dim() >= 2 or not name.endswith("bias")) and not parameter.any():
            parameter.normal_(std=0.02)


def _repeatable(host: ModuleHost, inputs: Any) -> Tensor:
    """The output; it must be numbers, and a second pass must give it again, or there is nothing to compare with."""
    bare = _seeded(host, inputs)
    if bare.isnan().any():
        raise AssertionError("the bare model's output is not a number")
    if not _equal(bare, _seeded(host, inputs)):
        raise AssertionError("the bare model does not repeat itself")
    return bare


def _seeded(host: ModuleHost, inputs: Any) -> Tensor:
    """The output from a fixed seed on: some models draw numbers in eval mode too, for a mask or for a sample."""
    torch.manual_seed(0)
    return host.forward_with_slots(inputs)


def _same(bare: Tensor, other: Tensor, what: str) -> None:
    if bare.shape != other.shape:
        raise AssertionError(f"{what}: its shape is {tuple(other.shape)} instead of {tuple(bare.shape)}")
    if not _equal(bare, other):
        raise AssertionError(f"{what}, by up to {float((bare - other).abs().max()):.2e}")


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two)


def _steepest(parameters: list[nn.Parameter]) -> float:
    return max((float(p.grad.abs().max()) for p in parameters if p.grad is not None), default=0.0)


def _loss(logits: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (logits.float() * torch.randn(logits.shape, generator=generator)).sum() / logits[0].numel() ** 0.5


def fast_initialisation() -> None:
    """Replace torch's random fills by cheap ones of the same scale, in this process; a sweep needs no quality."""
    block = torch.rand(1 << 20)
    half = len(block) // 2
    turn = itertools.count()

    def fill(tensor: Tensor, low: float, high: float) -> Tensor:
        if tensor.is_meta:
            return tensor
        start = next(turn) * 7919 % half  # no two matrices alike: with a query that is its key, some models give NaN
        with torch.no_grad():
            scaled = (block[start : start + min(half, tensor.numel())] * (high - low) + low).to(tensor.dtype)
            if not tensor.is_contiguous():
                tensor.copy_(scaled.repeat(-(-tensor.numel() // half))[: tensor.numel()].view(tensor.shape))
                return tensor
            for part in tensor.view(-1).split(half):
                part.copy_(scaled[: len(part)])
        return tensor

    def wrap(original: Callable[..., Tensor], bounds: Callable[..., tuple[float, float]]) -> Callable[..., Tensor]:
        def filled(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.numel() < 4096 or not self.is_floating_point():
                return original(self, *args, **kwargs)
            kwargs.pop("generator", None)
            return fill(self, *bounds(*args, **kwargs))

        return filled

    tensor: Any = torch.Tensor
    tensor.uniform_ = wrap(tensor.uniform_, lambda a=0.0, b=1.0: (a, b))
    tensor.normal_ = wrap(tensor.normal_, lambda mean=0.0, std=1.0: (mean - 1.73 * std, mean + 1.73 * std))
    original = tensor.erfinv_
    tensor.erfinv_ = lambda self: self if self.numel() >= 4096 else original(self)


def quiet_forever() -> None:
    """One thread, no warnings."""
    import warnings

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
