"""One optimizer for host and seeds: growth adds and removes groups, and leaves the moments of others alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from esper_core.kasmina.growth import StageChange
from esper_core.kasmina.modes import evaluating
from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import UntrackedParameter
from esper_core.leyline.host import HostProtocol, map_tensors
from esper_core.leyline.options import option_field
from esper_core.tolaria.caller_groups import GroupRef, family_of, source_of
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.muon import MuonAdamW, hidden_matrices
from esper_core.tolaria.sharding import ShardwiseAdamW, copy_all, is_sharded

_BARE: Final = "bare"
"""Key of a group without weight decay."""


@attrs.frozen
class OptimizerConfig:
    """Options `optimizer.NAME` of a run."""

    momentum: float = option_field(0.9, "momentum of sgd; beta1 of adamw", 0.0, 0.999999)
    beta2: float = option_field(0.999, "beta2 of adamw", 0.0, 0.999999)
    seed_warmup: int = option_field(10, "optimizer steps over which a new seed's learning rate rises", 0)
    fused: bool = option_field(True, "one kernel for a group, where the device has it")
    decay: str = option_field(
        "all",
        "what weight decay holds for: matrices leaves out norms, biases and other vectors",
        choices=("all", "matrices"),
    )


@attrs.define
class SeedGroup:
    """A seed's place in the optimizer. `age` counts its optimizer steps; `group` is torch's own param group.

    `bare`: a second group, where some of the parameters have weight decay and some have none.
    `deepens`: the seed is made of the host's blocks, and its gradient is clipped together with the host's.
    `source`: the caller's param group whose rate it follows; None: the run's own rate.
    """

    group: dict[str, Any]
    age: int = 0
    deepens: bool = False
    source: GroupRef | None = None
    bare: dict[str, Any] | None = None

    @property
    def groups(self) -> tuple[dict[str, Any], ...]:
        """Torch's own groups of the seed, one or two."""
        return (self.group,) if self.bare is None else (self.group, self.bare)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of all groups."""
        return [parameter for group in self.groups for parameter in group["params"]]


class GrowthOptimizer:
    """Updates the host's parameters and every live seed's.

    The host's group is made once and never rebuilt. A seed has a group of its own, with its own learning rate factor
    and warm-up; it is dropped with exactly its own state. A plane that is followed keeps this in step by itself.

    Args:
        host_parameters: what requires gradients in the host; empty if another optimizer updates the host.
        config: learning rate, weight decay, kind and seed factor.
        options: see `OptimizerConfig`.
        others: optimizers of the caller's own, which hold the host's parameters; they are never stepped here, but
            their state is saved and restored with the rest. A seed follows the rate of the param group that most of
            the block before it belongs to, see `caller_groups.source_of`.
        adopt: names of settings that seeds take from that group, such as `weight_decay`.
    """

    def __init__(
        self,
        host_parameters: Iterable[nn.Parameter],
        config: RunConfig,
        options: OptimizerConfig = OptimizerConfig(),
        others: Sequence[torch.optim.Optimizer] = (),
        adopt: Sequence[str] = (),
    ) -> None:
        self.config, self.options, self.others, self.adopt = config, options, tuple(others), tuple(adopt)
        self._plane: Plane | None = None
        self.seeds: dict[str, SeedGroup] = {}
        self.host_group: dict[str, Any] | None = None
        self.host_bare: dict[str, Any] | None = None
        self.torch: torch.optim.Optimizer | None = None
        self._not_hidden: frozenset[int] = frozenset()  # matrices of the host that Muon leaves to AdamW
        host = [p for p in host_parameters if p.requires_grad]
        if host:
            self.host_group, self.host_bare = self._add(host)

    def follow(self, plane: Plane) -> None:
        """Track the seeds of `plane` from now on."""
        if self.config.optimizer == "muon":
            module = plane.host.module
            matrices = {id(p) for p in module.parameters() if p.dim() == 2}
            self._not_hidden = frozenset(matrices - hidden_matrices(module, example_pass(plane.host)))
        self._plane = plane
        plane.on_change(self.on_stage_change)
        self.sync(plane)

    def on_stage_change(self, change: StageChange) -> None:
        """Add the parameters that a change created, and drop those that it removed."""
        gone = {id(p) for p in change.removed}
        for path, seed in list(self.seeds.items()):
            removed = [p for p in seed.parameters if id(p) in gone]
            if removed:
                self._forget(removed)
                for group in seed.groups:
                    group["params"] = [p for p in group["params"] if id(p) not in gone]
                if not seed.parameters and not change.added:
                    self._remove(path)
        fresh = [p for p in change.added if p.requires_grad]
        if fresh and change.slot in self.seeds:
            self._extend(self.seeds[change.slot], fresh)
        elif fresh:
            self.seeds[change.slot] = self._seed_group(change.slot, fresh, change.deepens)
        if fresh and change.inherits and self._inherit(change.inherits):
            self.seeds[change.slot].age = self.options.seed_warmup  # its moments know the way

    def _inherit(self, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> bool:
        """Give copies of parameters the state of their sources, whichever optimizer holds it; False if none has any.

        A state is taken over where this optimizer keeps one of the same kind: its keys must be the same.
        """
        assert self.torch is not None
        keys, taken = state_keys(self.torch), False
        for new, source in pairs:
            owner = next((o for o in (self.torch, *self.others) if source in o.state), None)
            state = owner.state[source] if owner is not None else {}
            if state and (owner is self.torch or state.keys() <= keys):
                _load_state(self.torch, new, {k: v for k, v in state.items() if isinstance(v, Tensor)})
                taken = True
        return taken

    def sync(self, plane: Plane) -> None:
        """Make the groups those of the seeds that live on `plane`, after it was rebuilt; their state is new."""
        for path in list(self.seeds):
            self._remove(path)
        for path, parameters in plane.seed_groups().items():
            trainable = [p for p in parameters if p.requires_grad]
            if trainable:
                self.seeds[path] = self._seed_group(path, trainable, plane.slots[path].whole)

    def check(self, plane: Plane) -> None:
        """Make sure that every live parameter is updated by an optimizer.

        Raises:
            UntrackedParameter: one is not.
        """
        optimizers = [*([self.torch] if self.torch else []), *self.others]
        tracked = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        for owner, module in (("host", plane.host.module), ("plane", plane.module)):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad and id(parameter) not in tracked:
                    raise UntrackedParameter(
                        f"{owner} parameter {name} trains but no optimizer updates it",
                        "every live parameter in one param group",
                        "accompany(model, [every optimizer of the loop], ...), or requires_grad_(False)"
                        if self.others and owner == "host"
                        else "GrowthOptimizer.follow(plane) before the plane changes",
                    )

    @property
    def learning_rate(self) -> float:
        """The host's, now: that of its own group, or of the caller's first."""
        groups = [self.host_group] if self.host_group else [g for other in self.others for g in other.param_groups]
        return float(groups[0]["lr"]) if groups else self.config.learning_rate

    def zero_grad(self) -> None:
        """Forget all gradients."""
        if self.torch is not None:
            self.torch.zero_grad(set_to_none=True)

    def step(self, learning_rate: float, stepper: Callable[[torch.optim.Optimizer], object] | None = None) -> None:
        """Update every parameter once.

        Args:
            learning_rate: of the host, now; a seed's is that times its factor and warm-up.
            stepper: called instead of `optimizer.step()`, for gradient scaling.
        """
        if self.torch is None:
            return
        for group in self._host_groups():
            group["lr"] = learning_rate
        for seed in self.seeds.values():
            seed.age += 1
            warmth = min(1.0, seed.age / max(1, self.options.seed_warmup))
            rate = learning_rate if seed.source is None else float(seed.source.now["lr"])
            for group in seed.groups:
                group["lr"] = rate * self.config.seed_learning_rate_factor * warmth
        if self.config.clip > 0:
            for parameters in self._clipped_together():
                nn.utils.clip_grad_norm_(parameters, self.config.clip)
        if stepper is None:
            self.torch.step()
        else:
            stepper(self.torch)

    def _clipped_together(self) -> Iterator[list[nn.Parameter]]:
        """Parameters that are clipped by one norm: host and copies of its blocks; every other seed by itself."""
        whole = [parameter for group in self._host_groups() for parameter in group["params"]]
        for seed in self.seeds.values():
            if seed.deepens:
                whole += seed.parameters
            else:
                yield seed.parameters
        if whole:
            yield whole

    def named_state(self) -> dict[str, Tensor]:
        """The live state tensors: `host.INDEX.KEY`, `seed.PATH.INDEX.KEY` and `other.N.M.INDEX.KEY`."""
        return {
            f"{name}.{index}.{key}": value
            for name, group, owner in self._groups()
            for index, parameter in enumerate(group["params"])
            for key, value in sorted(owner.state.get(parameter, {}).items())
            if isinstance(value, Tensor)
        }

    def load_named_state(self, tensors: Mapping[str, Tensor], ages: Mapping[str, int]) -> None:
        """Continue from `named_state()` and `ages()`, after `sync` has made the same groups."""
        wanted: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            place, _, key = name.rpartition(".")
            wanted.setdefault(place, {})[key] = tensor
        for name, group, owner in self._groups():
            for index, parameter in enumerate(group["params"]):
                _load_state(owner, parameter, wanted.get(f"{name}.{index}", {}))
        for path, seed in self.seeds.items():
            seed.age = ages.get(path, 0)

    def ages(self) -> dict[str, int]:
        """Optimizer steps of each seed, by path."""
        return {path: seed.age for path, seed in self.seeds.items()}

    def _groups(self) -> Iterator[tuple[str, dict[str, Any], torch.optim.Optimizer]]:
        """Name, param group and owner of everything that is updated; seeds by path."""
        if self.torch is not None:
            mine = {
                "host": self._host_groups(),
                **{f"seed.{path}": self.seeds[path].groups for path in sorted(self.seeds)},
            }
            for name, groups in mine.items():
                for group in groups:
                    yield f"{name}.bare" if group.get(_BARE) else name, group, self.torch
        for n, owner in enumerate(self.others):
            for m, group in enumerate(owner.param_groups):
                yield f"other.{n}.{m}", group, owner

    def _seed_group(self, path: str, parameters: Sequence[nn.Parameter], deepens: bool) -> SeedGroup:
        """A seed's group, with what it takes from the caller's group of the block before it."""
        (group, bare), source = self._add(parameters), None
        if self.others and self._plane is not None:
            source = source_of(self._plane.host, path, self.others, family_of(self.torch))
            if source is not None:
                theirs = source.now
                group.update({key: theirs[key] for key in self.adopt if key in theirs and key in group})
        return SeedGroup(group, deepens=deepens, source=source, bare=bare)

    def _add(self, parameters: Sequence[nn.Parameter]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Make a group of parameters, and one of those without weight decay if there are both kinds."""
        parts = [[p for p in parameters if self._decays(p) is decays] for decays in (True, False)]
        groups = [self._group(part) for part in parts if part]
        return groups[0], groups[1] if len(groups) > 1 else None

    def _group(self, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
        """A group of parameters that all have weight decay, or all have none."""
        if self.torch is None:
            self.torch = self._build(parameters)
        else:
            self.torch.add_param_group({"params": list(parameters)})
        group = self.torch.param_groups[-1]
        if not self._decays(parameters[0]):
            group |= {"weight_decay": 0.0, _BARE: True}
        return group

    def _decays(self, parameter: Tensor) -> bool:
        return self.options.decay == "all" or parameter.dim() > 1

    def _extend(self, seed: SeedGroup, parameters: Iterable[nn.Parameter]) -> None:
        """Add parameters to the groups of a seed that has some already."""
        for parameter in parameters:
            bare = not self._decays(parameter)
            group = next((group for group in seed.groups if bool(group.get(_BARE)) is bare), None)
            if group is None:
                seed.bare = self._group([parameter])
            else:
                group["params"].append(parameter)

    def _host_groups(self) -> tuple[dict[str, Any], ...]:
        return tuple(group for group in (self.host_group, self.host_bare) if group is not None)

    def _build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        config, options = self.config, self.options
        fused = options.fused and all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
        shared: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        if config.optimizer == "sgd":  # torch's fused one fails on a group in which only some have momentum yet
            return torch.optim.SGD(list(parameters), momentum=options.momentum, **shared)
        betas = (options.momentum, options.beta2)
        if any(p.dtype is torch.float16 for p in parameters):
            shared["eps"] = 1e-4  # float16 rounds 1e-8, and squares below 6e-8, to zero: steps would have no bound
        if config.optimizer == "muon":
            return MuonAdamW(list(parameters), is_matrix=self._is_hidden, betas=betas, fused=fused or None, **shared)
        kind = ShardwiseAdamW if any(map(is_sharded, parameters)) else torch.optim.AdamW
        return kind(list(parameters), betas=betas, fused=fused or None, **shared)

    def _is_hidden(self, parameter: Tensor) -> bool:
        """Whether Muon updates it: a matrix inside the host, or any matrix of a seed."""
        return parameter.dim() == 2 and id(parameter) not in self._not_hidden

    def _remove(self, path: str) -> None:
        seed = self.seeds.pop(path)
        self._forget(seed.parameters)
        assert self.torch is not None
        self.torch.param_groups[:] = [g for g in self.torch.param_groups if not any(g is own for own in seed.groups)]
        if not self.torch.param_groups:
            self.torch = None

    def _forget(self, parameters: Iterable[nn.Parameter]) -> None:
        assert self.torch is not None
        for parameter in parameters:
            self.torch.state.pop(parameter, None)


def example_pass(host: HostProtocol) -> Callable[[], object] | None:
    """What runs the host once on its example, in eval mode and leaving no trace; None where it has no example."""
    example = getattr(host, "example", None)
    if example is None:
        return None
    device = next(host.module.parameters()).device

    def run() -> object:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluating(host.module):
            return host.forward_with_slots(map_tensors(lambda tensor: tensor.to(device), example))

    return run


def state_keys(optimizer: torch.optim.Optimizer) -> frozenset[str]:
    """The state that an optimizer of this kind keeps for a parameter."""
    if isinstance(optimizer, torch.optim.SGD):
        return frozenset({"momentum_buffer"})
    return frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})


def _load_state(owner: torch.optim.Optimizer, parameter: nn.Parameter, saved: Mapping[str, Tensor]) -> None:
    """Give one parameter its saved optimizer state, in the memory format and on the device where torch keeps it."""
    if not saved:
        owner.state.pop(parameter, None)
        return
    state: dict[str, Tensor] = owner.state[parameter]
    for key, tensor in saved.items():
        if key not in state:
            moment = tensor.shape == parameter.shape and tensor.dim() > 0
            # a step count lives on the CPU, unless one kernel updates a whole group
            device = parameter.device if moment or owner.defaults.get("fused") else tensor.device
            state[key] = torch.empty_like(parameter) if moment else torch.empty_like(tensor, device=device)
        copy_all([state[key]], [tensor])
