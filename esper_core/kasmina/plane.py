"""The plane: one per model, owner of every slot, seed and ledger."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Any

import attrs
import torch
from torch import nn

from esper_core.kasmina import legality, merging, nursery, plane_view
from esper_core.kasmina.around import PREFIX
from esper_core.kasmina.blends import BlendOptions, parse_blend, parse_blends
from esper_core.kasmina.candidates import Candidates
from esper_core.kasmina.growth import Growth, StageChange, gate_value
from esper_core.kasmina.ledger import UNLIMITED, Ledger, Limits, count_parameters
from esper_core.kasmina.module_copy import computed_tensors
from esper_core.kasmina.paths import ancestors_of, base_of, height_of
from esper_core.kasmina.plane_hooks import adopt_hooks
from esper_core.kasmina.ramps import Ramps
from esper_core.kasmina.ranks import Ranks
from esper_core.kasmina.slot import SeedSlot
from esper_core.kasmina.sources import run_at
from esper_core.kasmina.territory import Territory
from esper_core.leyline.actions import Command, Tempo
from esper_core.leyline.errors import BadOption, EsperError, IllegalCommand, UnknownName, did_you_mean
from esper_core.leyline.host import HostProtocol
from esper_core.leyline.stages import (
    EMPTY,
    STAGES,
    Op,
    Stage,
    Transition,
    automatic_transitions,
    waits_for_steps,
)
from esper_core.leyline.view import Interval, SlotView
from esper_core.registry import Registry


class Plane:
    """The slots of a host and the seeds that grow in them.

    Args:
        host: what grows.
        registry: where blueprints and blends come from.
        points: names of the injection points to use; None for all.
        blueprints: names that may grow; None for every one that fits.
        blends: blends that commands may name; the first is the default.
        seed: with a slot's path and its count of births it fixes a seed's initial weights.
        limits: budgets for all seeds together.
        ramp_steps: optimizer steps of a ramp at standard tempo.
        embargo: decision steps for which a culled slot stays empty.
        max_stack: seeds that may fossilise at one point, one upon the other.
        merge: a seed that is an update of its layer's weight is merged into it as soon as it has fossilised.
        rent: lambda; a seed pays `rent * params / host_params` (nats).
        host_flops: forward FLOPs of the host for one example, if already counted.
        blueprint_options: blueprint name to options.
        blend_options: name of a combination or curve to options.

    Raises:
        UnknownName: a point, blueprint or blend of that name does not exist.
        IllegalCommand: not one of `blueprints` can grow at any of the points.
        EsperError: the host offers no injection point.
        BadOption: `merge` without a point around a layer.
    """

    def __init__(
        self,
        host: HostProtocol,
        registry: Registry,
        *,
        points: Sequence[str] | None = None,
        blueprints: Sequence[str] | None = None,
        blends: Sequence[str] = ("residual:cosine",),
        seed: int = 0,
        limits: Limits = UNLIMITED,
        ramp_steps: int = 50,
        embargo: int = 2,
        max_stack: int = 1,
        merge: bool = False,
        rent: float = 0.05,
        host_flops: int = 0,
        blueprint_options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        blend_options: BlendOptions = MappingProxyType({}),
    ) -> None:
        if not host.injection_specs:
            raise EsperError("the host offers no injection point", "at least one", "esper hosts show HOST")
        self.host, self.seed, self.limits = host, seed, limits
        self.ramp_steps, self.embargo_decisions, self.max_stack, self.rent = ramp_steps, embargo, max_stack, rent
        self.merge_fossils = merge
        self.ranks = Ranks()  # replaced where several processes train
        self.blends = parse_blends(blends, registry)
        self.blend_options = {name: dict(options) for name, options in blend_options.items()}
        self.candidates = Candidates(registry, blueprints, blueprint_options, partial(run_at, self))
        self.host_params, self.host_flops = count_parameters(host.module), host_flops
        self._territory = Territory(host)
        self._ramps = Ramps(self._build_curve)
        self._listeners: list[Callable[[StageChange], None]] = []
        self._merge_listeners: list[Callable[[str], None]] = []
        self._veto_listeners: list[Callable[[Command, str, BaseException], None]] = []
        wanted = list(host.injection_specs) if points is None else list(points)
        if merge and not any(PREFIX in name for name in wanted):
            raise BadOption("plane.merge=true without slots around layers", "some", "--slots around:attn,mlp")
        for name in wanted:
            if name not in host.injection_specs:
                hint = did_you_mean(name, host.injection_specs) or "esper hosts show HOST"
                raise UnknownName(f"the host has no injection point {name!r}", ", ".join(host.injection_specs), hint)
        for name in sorted(set(wanted), key=lambda n: (host.injection_specs[n].order, n)):
            self._territory.mount(host, name, name)
        if blueprints is not None:
            self.candidates.refuse_misfits({path: slot.spec for path, slot in self._slots.items()})

    # --- What there is ---

    @property
    def registry(self) -> Registry:
        """Where blueprints and blends come from."""
        return self.candidates.registry

    @registry.setter
    def registry(self, registry: Registry) -> None:
        self.candidates.registry = registry

    def growth(self, path: str) -> Growth:
        """The state of the slot at `path`.

        Raises:
            UnknownName: no such slot.
        """
        return self._territory.growth(path)

    @property
    def slots(self) -> Mapping[str, SeedSlot]:
        """Every slot by path, in depth order; a stacked or nested slot follows the one that it belongs to."""
        return MappingProxyType(self._slots)

    @property
    def module(self) -> nn.Module:
        """Holds the slots and nothing of the host: its state_dict is that of the seeds."""
        return self._territory.module

    @property
    def growths(self) -> Mapping[str, Growth]:
        """The state of each slot, by path, in depth order."""
        return self._territory.growths

    @property
    def _slots(self) -> dict[str, SeedSlot]:
        return self._territory.slots

    @property
    def ledger(self) -> Ledger:
        """Parameters and FLOPs as they stand now."""
        rent_payers = {path: g for path, g in self.growths.items() if STAGES[g.stage].pays_rent}
        return Ledger(
            self.host_params,
            self.host_flops,
            {path: g.params for path, g in rent_payers.items()},
            {path: g.flops for path, g in rent_payers.items()},
        )

    def rent_of(self, path: str) -> float:
        """The rent of the seed at `path` and of all seeds nested in it, in nats: rent * params / host_params.

        The gain of an organ is that of its whole tree, so it pays for the whole tree.
        """
        params = self.growths[path].params + self.inner_cost(path)[0]
        return self.rent * params / max(self.host_params, 1)

    def inner_cost(self, path: str) -> tuple[int, int]:
        """Parameters and forward FLOPs (one example) of all seeds that are nested in the one at `path`."""
        inside = [self.growths[child] for child in self._territory.children(path)]
        payers = [growth for growth in inside if STAGES[growth.stage].pays_rent]
        return sum(growth.params for growth in payers), sum(growth.flops for growth in payers)

    def cost(self, path: str, blueprint: str, options: Mapping[str, Any] = MappingProxyType({})) -> tuple[int, int]:
        """Parameters and forward FLOPs (one example) of a seed of `blueprint` at `path`, by the blueprint's estimate.

        Raises:
            UnknownName: no such blueprint.
            IllegalCommand: the blueprint does not fit the point.
        """
        return self.candidates.cost(path, self._slots[path].spec, blueprint, options)

    def seed_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of every live seed and its blend, by path."""
        return {path: list(_own_parameters(slot)) for path, slot in self._slots.items() if slot.seed is not None}

    def contributing(self) -> list[str]:
        """Paths of the slots whose seed contributes to the model's output by itself, in depth order.

        A seed inside one that does not contribute does not contribute either, in any stage of its own.
        """
        live = ((p, g) for p, g in self.growths.items() if not g.merged)
        shows = {p for p, g in live if STAGES[g.stage].contributes and g.alpha > 0}
        return [path for path in self.growths if path in shows and shows.issuperset(ancestors_of(path))]

    def views(self) -> tuple[SlotView, ...]:
        """Every slot as a controller sees it."""
        return plane_view.slot_views(self)

    def on_change(self, listener: Callable[[StageChange], None]) -> None:
        """Call `listener` after every change of a stage."""
        self._listeners.append(listener)

    def on_merge(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with a slot's path after its seed was merged or taken out again."""
        self._merge_listeners.append(listener)

    def on_veto_fault(self, listener: Callable[[Command, str, BaseException], None]) -> None:
        """Have `listener` called where a veto raises while a view asks for it: with command, whose veto, and error."""
        self._veto_listeners.append(listener)

    def tell_veto_fault(self, command: Command, author: str, error: BaseException) -> None:
        """Tell the listeners of a veto that raised instead of answering."""
        for listener in self._veto_listeners:
            listener(command, author, error)

    # --- Commands ---

    def germinate(self, path: str, blueprint: str, blend: str = "", **about: Any) -> StageChange:
        """Build a seed of `blueprint` in the empty slot at `path`."""
        return self._must(Command(Op.GERMINATE, path, blueprint, blend, **about))

    def advance(self, path: str, *, gated: bool = True, **about: Any) -> StageChange:
        """Move the seed at `path` one stage on: into BLENDING, or from PROBATIONARY into FOSSILIZED."""
        return self._must(Command(Op.ADVANCE, path, **about), gated=gated)

    def wither(self, path: str, **about: Any) -> StageChange:
        """Let alpha of the seed at `path` fall to zero."""
        return self._must(Command(Op.WITHER, path, **about))

    def revive(self, path: str, **about: Any) -> StageChange:
        """Return a withering seed to the stage that it left."""
        return self._must(Command(Op.REVIVE, path, **about))

    def cull(self, path: str, *, gated: bool = True, **about: Any) -> StageChange:
        """Remove the seed at `path`."""
        return self._must(Command(Op.CULL, path, **about), gated=gated)

    def check(self, command: Command, *, gated: bool = True) -> Transition | None:
        """The transition that `command` would take; None for WAIT. Changes nothing.

        Args:
            gated: whether the transition's gates must pass.

        Raises:
            UnknownName: no such slot, blueprint or blend.
            IllegalCommand: table, gate, budget, embargo or a plugin's veto refuses.
        """
        return legality.check(self, command, gated=gated)

    def apply(self, command: Command, *, gated: bool = True) -> StageChange | None:
        """Carry out `command`; None for WAIT. A refused command changes nothing.

        Raises:
            UnknownName, IllegalCommand: see `check`.
            IncompatibleSeed: the built seed does not fit the slot.
        """
        changes = self.apply_all(command, gated=gated)
        return changes[0] if changes else None

    def apply_all(self, command: Command, *, gated: bool = True) -> list[StageChange]:
        """Carry out `command` at every slot that it names, in one event; a refusal at one of them changes nothing.

        Returns:
            The changes that were asked for, slot by slot; automatic transitions after them reach listeners only.

        Raises:
            UnknownName, IllegalCommand, IncompatibleSeed: see `apply`.
        """
        parts = command.each()
        asked = [(part, found) for part in parts if (found := self.check(part, gated=gated)) is not None]
        if command.op is Op.GERMINATE and len(parts) > 1:
            legality.check_budget(self, parts)
        before = {path: copy.deepcopy(self.growths[path]) for path in command.slots} if len(parts) > 1 else {}
        changes: list[StageChange] = []
        try:
            for part, transition in asked:
                changes.append(self._take(transition, part))
        except EsperError:
            for change in changes:
                if change.command.op is Op.GERMINATE:
                    self._remove_seed(change.slot)
                self._territory.growths[change.slot] = before[change.slot]
            raise
        for change in changes:
            if self.merge_fossils and change.after.spec.permanent and not merging.refusal(self, change.slot):
                with suppress(IllegalCommand):  # as it would have changed what the model computes
                    self.merge(change.slot)
            self.tell(change)
        for part in parts:
            if part.slot in self.growths and (self.growths[part.slot].direct or part.tempo is Tempo.INSTANT):
                self._advance_automatically(part.slot)
        return changes

    def merge(self, path: str) -> None:
        """Merge the fossilised seed at `path` into its layer's weight; see `merging.merge`."""
        merging.merge(self, path)
        self._tell_merge(path)

    def unmerge(self, path: str) -> None:
        """Take it out again; see `merging.unmerge`."""
        merging.unmerge(self, path)
        self._tell_merge(path)

    def embargo(self, path: str, decisions: int) -> None:
        """Refuse germination at `path` for that many decision steps more."""
        growth = self.growth(path)
        growth.embargo_left = max(growth.embargo_left, decisions)

    def bar(self, path: str, family: str, decisions: int) -> None:
        """Refuse germination of blueprints of `family` at `path` for that many decision steps, from any controller."""
        growth = self.growth(path)
        if decisions > 0:
            growth.barren = {**growth.barren, family: max(growth.barren.get(family, 0), decisions)}

    # --- Time ---

    def step(self) -> list[StageChange]:
        """Call after every optimizer step: moves alphas, and takes the automatic transitions that are due."""
        changes: list[StageChange] = []
        for path in self._ramps.step():
            self._ramps.drop(path)
            changes += self._advance_automatically(path)
            if waits_for_steps(self.growths[path].stage) and path not in self._ramps:
                self._follow(path)
        return changes

    def decide(self) -> list[StageChange]:
        """Call at every decision step: updates ages and embargoes, and takes the automatic transitions that are due."""
        changes: list[StageChange] = []
        for path, growth in list(self.growths.items()):
            growth.embargo_left = max(0, growth.embargo_left - 1)
            if growth.barren:
                growth.barren = {family: left - 1 for family, left in growth.barren.items() if left > 1}
            growth.stage_age += 1
            if self._slots[path].seed is not None:
                growth.age += 1
            changes += self._advance_automatically(path)
        return changes

    def record(
        self,
        path: str,
        *,
        loss: Interval | None = None,
        accuracy: Interval | None = None,
        readings: Mapping[str, float] | None = None,
    ) -> None:
        """Store measurements of the slot at `path`, for gates and views.

        Args:
            loss: validation loss without the slot minus with it (nats).
            accuracy: validation accuracy with the slot minus without it.
            readings: sensor readings; they replace the earlier ones.
        """
        growth = self.growth(path)
        if readings is not None:
            growth.readings = dict(readings)
        if loss is not None:
            growth.loss, growth.accuracy = loss, accuracy
            growth.counterfactual_count += 1
            earns = loss.mean - self.rent_of(path) > 0
            growth.probation_count = growth.probation_count + 1 if earns else 0

    # --- Structure ---

    def structure(self) -> list[dict[str, Any]]:
        """The seeds and their states as JSON-compatible data; with `module.state_dict()` the plane's complete state."""
        return [{"path": path, **growth.to_dict()} for path, growth in self.growths.items()]

    def rebuild(self, structure: Iterable[Mapping[str, Any]]) -> None:
        """Replace all seeds by those that `structure` describes; weights are initial until loaded.

        Raises:
            UnknownName, PluginBroken, MissingDependency: a blueprint or blend is not available.
        """
        for path in list(self._slots):
            if path in self._slots and self._slots[path].seed is not None:
                self._remove_seed(path)
        for path in [p for p in self._slots if base_of(p) != p]:
            self._territory.unmount(path)
        for entry in structure:
            path = str(entry["path"])
            growth = Growth.from_dict({k: v for k, v in entry.items() if k != "path"})
            if path not in self._slots:
                self._territory.stack(path)
            self._territory.growths[path] = growth
            if STAGES[growth.stage].occupied:
                slot = self._slots[path]
                command = Command(Op.GERMINATE, path, growth.blueprint, growth.blend, options=growth.options)
                nursery.plant(self, slot, command, growth.births, growth.origins, known=True)
                self._territory.mount_children(path)
                slot.set_stage(growth.stage)
                self._set_alpha(path, growth.alpha)
                if growth.merged and slot.spec.layer is not None:
                    slot.merge(torch.ones(slot.spec.layer.outputs, device=slot.alpha.device))
                if growth.ramping or waits_for_steps(growth.stage):
                    self._follow(path)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plane:
        """An independent plane over an independent host; the registry is shared, listeners stay behind."""
        twin = object.__new__(Plane)
        memo[id(self)] = twin
        memo[id(self.registry)], memo[id(self.ranks)] = self.registry, self.ranks
        for module in (self.host.module, self.module):
            memo |= {key: value for key, value in computed_tensors(module).items() if key not in memo}
        for name, value in self.__dict__.items():
            setattr(twin, name, [] if name.endswith("_listeners") else copy.deepcopy(value, memo))
        for module in (twin.host.module, twin.module):
            adopt_hooks(module)
        return twin

    # --- Inside ---

    def _must(self, command: Command, *, gated: bool = True) -> StageChange:
        change = self.apply(command, gated=gated)
        assert change is not None
        return change

    def _take(self, transition: Transition, command: Command) -> StageChange:
        slot, growth = self._slots[command.slot], self.growths[command.slot]
        before, blueprint, blend = growth.stage, growth.blueprint, growth.blend
        added: tuple[nn.Parameter, ...] = ()
        removed: tuple[nn.Parameter, ...] = ()
        inherits: tuple[tuple[nn.Parameter, nn.Parameter], ...] = ()
        after = transition.target or growth.resume_stage
        assert after is not None
        if command.op is Op.GERMINATE:
            blend = str(parse_blend(command.blend or self.blends[0], self.registry))
            planted = nursery.plant(self, slot, attrs.evolve(command, blend=blend), growth.births + 1)
            growth.clear()
            growth.births += 1
            growth.blueprint, growth.blend, growth.tempo = command.blueprint, blend, command.tempo
            growth.options = self.candidates.options(command.blueprint, command.options)
            growth.params, growth.flops = planted.params, planted.flops
            growth.direct, growth.origins, inherits = planted.direct, list(planted.origins), planted.inherits
            added, blueprint = tuple(_own_parameters(slot)), command.blueprint
            self._territory.mount_children(command.slot)
        elif command.op is Op.CULL:
            removed = self._cull_inside(command)
            growth.culled = {**growth.culled, blueprint: growth.culled.get(blueprint, 0) + 1}
            growth.clear()
            growth.embargo_left = max(growth.embargo_left, self.embargo_decisions)
        elif command.op is Op.WITHER:
            growth.resume_stage = before
            self._ramp(command, growth, 0.0)
        elif command.op is Op.REVIVE:
            growth.resume_stage = None
            self._ramp(command, growth, 1.0)
        elif after.spec.ramping:
            added, removed = self._choose_blend(command, slot, growth)
            blend = growth.blend
            self._ramp(command, growth, after.spec.ramps_to or 0.0)
        growth.enter(after)
        slot.set_stage(after)
        if waits_for_steps(after):
            self._follow(command.slot)
        if after.spec.permanent:  # behind a copy stands a block of the host again, at which more may grow
            height = height_of(command.slot) + 2
            self._territory.offer_stack(command.slot, max(self.max_stack, height) if slot.whole else self.max_stack)
        return StageChange(command.slot, before, after, command, blueprint, blend, added, removed, inherits, slot.whole)

    def tell(self, change: StageChange) -> None:
        """Call the listeners of changes."""
        for listener in self._listeners:
            listener(change)

    def _tell_merge(self, path: str) -> None:
        for listener in self._merge_listeners:
            listener(path)

    def _choose_blend(
        self, command: Command, slot: SeedSlot, growth: Growth
    ) -> tuple[tuple[nn.Parameter, ...], tuple[nn.Parameter, ...]]:
        """Change to the blend that an ADVANCE into BLENDING names, if it differs from the one chosen at birth."""
        growth.tempo = command.tempo if command.tempo is not Tempo.STANDARD else growth.tempo
        wanted = str(parse_blend(command.blend, self.registry)) if command.blend else growth.blend
        if wanted == growth.blend:
            return (), ()
        assert slot.combination is not None and slot.seed is not None
        old = tuple(slot.combination.parameters())
        nursery.fit_combination(self, slot, wanted)
        growth.blend = wanted
        growth.params = count_parameters(slot.seed, slot.combination)
        return tuple(slot.combination.parameters()), old

    def _ramp(self, command: Command, growth: Growth, target: float) -> None:
        tempo = command.tempo if command.tempo is not Tempo.STANDARD else growth.tempo
        growth.start_ramp(target, round(self.ramp_steps * tempo.factor))
        if tempo is Tempo.INSTANT:
            growth.ramp_done = growth.ramp_steps
            self._set_alpha(command.slot, target)
        self._follow(command.slot)

    def _advance_automatically(self, path: str) -> list[StageChange]:
        changes: list[StageChange] = []
        growth = self.growths[path]
        while True:
            rent = self.rent_of(path)
            transition = next(
                (
                    t
                    for t in automatic_transitions(growth.stage)
                    if all(gate.passes(gate_value(gate, growth, rent)) for gate in t.gates)
                ),
                None,
            )
            if transition is None:
                if changes and not growth.stage.spec.ramping and not waits_for_steps(growth.stage):
                    self._ramps.drop(path)  # as after `rebuild`: a stage that a step moves nothing in counts none
                return changes
            command = Command(Op.ADVANCE, path, source="plane", reason=transition.gates[-1].summary)
            changes.append(self._take(transition, command))
            self.tell(changes[-1])

    def _follow(self, path: str) -> None:
        """Include the slot at `path` in `step`, as its alpha moves or its stage waits for steps."""
        self._ramps.follow(path, self.growths[path], self._slots[path])

    def _build_curve(self, growth: Growth) -> tuple[str, Callable[[float], float]]:
        blend = parse_blend(growth.blend, self.registry)
        return blend.curve, blend.build_curve(self.registry, self.blend_options)

    def _set_alpha(self, path: str, value: float) -> None:
        self.growths[path].alpha = value
        self._slots[path].set_alpha(value)

    def _cull_inside(self, command: Command) -> tuple[nn.Parameter, ...]:
        """Empty a slot; nested seeds are culled before it, from the inside outwards, each with its own event.

        Returns:
            The parameters of the slot's own seed and blend.
        """
        changes = []
        for path in reversed(self._territory.children(command.slot)):
            growth, parameters = self.growths[path], tuple(_own_parameters(self._slots[path]))
            if STAGES[growth.stage].occupied:
                why = attrs.evolve(command, slot=path, reason=f"{command.slot}, which held it, was culled")
                change = StageChange(path, growth.stage, Stage.CULLED, why, growth.blueprint, growth.blend)
                changes.append(attrs.evolve(change, removed=parameters))
        own = tuple(_own_parameters(self._slots[command.slot]))
        self._remove_seed(command.slot)
        for change in changes:
            self.tell(change)
        return own

    def _remove_seed(self, path: str) -> tuple[nn.Parameter, ...]:
        """Empty the slot and everything nested in its seed; returns the parameters that are gone."""
        slot = self._slots[path]
        gone = list(_own_parameters(slot))
        for child in reversed(self._territory.children(path)):
            gone += list(_own_parameters(self._slots[child]))
            self._ramps.drop(child)
            self._territory.unmount(child)
        slot.seed = slot.combination = slot.fold = None
        slot.whole = slot.wants_call = False
        slot.set_stage(EMPTY)
        self._set_alpha(path, 0.0)
        self._ramps.drop(path)
        return tuple({id(p): p for p in gone}.values())


def _own_parameters(slot: SeedSlot) -> Iterable[nn.Parameter]:
    for module in (slot.seed, slot.combination):
        if module is not None:
            yield from module.parameters()
