"""The plane: one per model, owner of every slot, seed and ledger."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import attrs
from torch import nn

from esper_core.kasmina import nursery, plane_view
from esper_core.kasmina.blends import parse_blend, parse_blends
from esper_core.kasmina.growth import Growth, gate_value
from esper_core.kasmina.ledger import Ledger, count_parameters
from esper_core.kasmina.paths import base_of, height_of
from esper_core.kasmina.ramps import AlphaWriter, Shares
from esper_core.kasmina.slot import SeedSlot
from esper_core.kasmina.territory import Territory, ancestors_of
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
    find_transition,
    legal_ops,
    waits_for_steps,
)
from esper_core.leyline.view import Interval, SlotView
from esper_core.registry import Registry


@attrs.frozen
class Limits:
    """What all seeds together may cost; None is unlimited. FLOPs are of one example's forward pass."""

    params: int | None = None
    flops: int | None = None


@attrs.frozen
class StageChange:
    """A slot moved.

    Attributes:
        slot: its path. before, after: stages. command: what asked for it.
        blueprint, blend: of the seed that moved (also of one that is gone now).
        added, removed: parameters that came to life or left the model.
        inherits: each of the added that is a copy, with the parameter that it is a copy of.
        deepens: the seed is made of the host's own blocks.
    """

    slot: str
    before: Stage
    after: Stage
    command: Command
    blueprint: str
    blend: str
    added: tuple[nn.Parameter, ...] = ()
    removed: tuple[nn.Parameter, ...] = ()
    inherits: tuple[tuple[nn.Parameter, nn.Parameter], ...] = ()
    deepens: bool = False


class Plane:
    """A host's slots and everything that grows in them.

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
        rent: lambda; a seed pays `rent * params / host_params` (nats).
        host_flops: forward FLOPs of the host for one example, if already counted.
        blueprint_options: blueprint name to options.

    Raises:
        UnknownName: a point, blueprint or blend of that name does not exist.
        IllegalCommand: not one of `blueprints` can grow at any of the points.
        EsperError: the host offers no injection point.
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
        limits: Limits = Limits(),
        ramp_steps: int = 50,
        embargo: int = 2,
        max_stack: int = 1,
        rent: float = 0.05,
        host_flops: int = 0,
        blueprint_options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> None:
        if not host.injection_specs:
            raise EsperError("the host offers no injection point", "at least one", "esper hosts show HOST")
        self.host, self.registry, self.seed, self.limits = host, registry, seed, limits
        self.ramp_steps, self.embargo_decisions, self.max_stack, self.rent = (
            ramp_steps,
            embargo,
            max_stack,
            rent,
        )
        self.blends = parse_blends(blends, registry)
        self.blueprint_options = {name: dict(options) for name, options in blueprint_options.items()}
        self.candidates = plane_view.find_candidates(registry, blueprints)
        self.host_params, self.host_flops = count_parameters(host.module), host_flops
        self._territory = Territory(host)
        self._moving: dict[str, tuple[Growth, SeedSlot, Shares | None]] = {}  # found once, since they may be a thousand
        self._shares: dict[tuple[str, int], Shares] = {}
        self._writer = AlphaWriter()
        self._costs: dict[tuple[object, ...], tuple[int, int]] = {}
        self._listeners: list[Callable[[StageChange], None]] = []
        wanted = list(host.injection_specs) if points is None else list(points)
        for name in wanted:
            if name not in host.injection_specs:
                hint = did_you_mean(name, host.injection_specs) or "esper hosts show HOST"
                raise UnknownName(f"the host has no injection point {name!r}", ", ".join(host.injection_specs), hint)
        for name in sorted(set(wanted), key=lambda n: (host.injection_specs[n].order, n)):
            self._territory.mount(host, name, name)
        if blueprints is not None:
            plane_view.refuse_misfits(self, self.candidates)

    # --- What there is ---

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
        """What is remembered of each slot, by path, in depth order."""
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
        """What the seed at `path` pays with all that is nested in it, in nats: rent * params / host_params.

        An organ is judged by what its whole tree brings, so it pays for its whole tree.
        """
        params = self.growths[path].params + self.inner_cost(path)[0]
        return self.rent * params / max(self.host_params, 1)

    def inner_cost(self, path: str) -> tuple[int, int]:
        """Parameters and forward FLOPs (one example) of all seeds that are nested in the one at `path`."""
        inside = [self.growths[child] for child in self._territory.children(path)]
        payers = [growth for growth in inside if STAGES[growth.stage].pays_rent]
        return sum(growth.params for growth in payers), sum(growth.flops for growth in payers)

    def seed_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of every live seed and its blend, by path."""
        return {path: list(_own_parameters(slot)) for path, slot in self._slots.items() if slot.seed is not None}

    def contributing(self) -> list[str]:
        """Paths of the slots whose seed shows in the model's output, in depth order.

        A seed that is nested in one that does not show does not show either, whatever its own stage.
        """
        shows = {p for p, g in self.growths.items() if STAGES[g.stage].contributes and g.alpha > 0}
        return [path for path in self.growths if path in shows and shows.issuperset(ancestors_of(path))]

    def views(self) -> tuple[SlotView, ...]:
        """Every slot as a controller sees it."""
        return plane_view.slot_views(self)

    def on_change(self, listener: Callable[[StageChange], None]) -> None:
        """Have `listener` called after every change of a stage."""
        self._listeners.append(listener)

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
        if command.op is Op.WAIT:
            return None
        growth = self._territory.growth(command.slot)
        transition = find_transition(growth.stage, command.op)
        if transition is None:
            legal = ", ".join(sorted(legal_ops(growth.stage)))
            raise IllegalCommand(f"{command.op} at {command.slot}, which is {growth.stage}", f"one of {legal}")
        if transition.auditor_only and command.source != "emrakul":
            raise IllegalCommand(
                f"{command.op} of the {growth.stage} seed at {command.slot} by {command.source}", "Emrakul"
            )
        for gate in transition.gates if gated else ():
            value = gate_value(gate, growth, self.rent_of(command.slot))
            if not gate.passes(value):
                shown = "unmeasured" if value is None else f"{value:.4g}"
                raise IllegalCommand(
                    f"{command.op} at {command.slot}: {gate.measure} is {shown}",
                    f"{gate.measure} {gate.comparison} {gate.threshold:g} ({gate.summary})",
                )
        if command.op is Op.GERMINATE:
            self._check_germination(command, growth)
        elif command.blend:
            parse_blend(command.blend, self.registry)
        veto = self._veto(command)
        if veto:
            raise IllegalCommand(f"{command.op} at {command.slot} was vetoed: {veto}")
        return transition

    def permits(self, command: Command) -> bool:
        """Whether no plugin vetoes `command`. Views ask, so that no controller is offered what would be refused."""
        return not self.registry.hook.esper_veto.get_hookimpls() or not self._veto(command)

    def _veto(self, command: Command) -> str:
        """Why a plugin refuses `command`; empty if none does. A veto that fails refuses too: it is there to guard."""
        try:
            return self.registry.hook.esper_veto(command=command, plane=self) or ""
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin may raise anything
            return f"a plugin's veto failed with {type(error).__name__}: {error}"

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
            The changes that were asked for, slot by slot; what follows by itself is told to listeners only.

        Raises:
            UnknownName, IllegalCommand, IncompatibleSeed: see `apply`.
        """
        parts = command.each()
        asked = [(part, found) for part in parts if (found := self.check(part, gated=gated)) is not None]
        if command.op is Op.GERMINATE and len(parts) > 1:
            self._check_budget(parts)
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
            self._tell(change)
        for part in parts:
            if part.slot in self.growths and (self.growths[part.slot].direct or part.tempo is Tempo.INSTANT):
                self._advance_automatically(part.slot)
        return changes

    def embargo(self, path: str, decisions: int) -> None:
        """Refuse germination at `path` for that many decision steps more."""
        growth = self._territory.growth(path)
        growth.embargo_left = max(growth.embargo_left, decisions)

    def bar(self, path: str, family: str, decisions: int) -> None:
        """Refuse germination of blueprints of `family` at `path` for that many decision steps, whoever asks."""
        growth = self._territory.growth(path)
        if decisions > 0:
            growth.barren = {**growth.barren, family: max(growth.barren.get(family, 0), decisions)}

    # --- Time ---

    def step(self) -> list[StageChange]:
        """After every optimizer step: alphas move, and what is due by itself happens."""
        changes: list[StageChange] = []
        due: list[str] = []
        ramping: list[SeedSlot] = []
        alphas: list[float] = []
        for path, (growth, slot, shares) in self._moving.items():
            growth.stage_steps += 1
            done, steps = growth.ramp_done, growth.ramp_steps
            if done < steps:
                growth.ramp_done = done = done + 1
                start = growth.ramp_start
                if shares is None or shares.steps != steps:
                    shares = self._begin_ramp(path)
                growth.alpha = alpha = start + (growth.ramp_target - start) * shares[done]
                ramping.append(slot)
                alphas.append(alpha)
            if done >= steps:
                due.append(path)
        self._writer.write(ramping, alphas)
        for path in sorted(due):
            self._moving.pop(path, None)
            changes += self._advance_automatically(path)
            if waits_for_steps(self.growths[path].stage) and path not in self._moving:
                self._watch(path)
        return changes

    def decide(self) -> list[StageChange]:
        """At every decision step: ages and embargoes move, and what is due by itself happens."""
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
        """Take in what was measured of the slot at `path`; gates and views read it.

        Args:
            loss: validation loss without the slot minus with it (nats).
            accuracy: validation accuracy with the slot minus without it.
            readings: sensor readings; they replace the earlier ones.
        """
        growth = self._territory.growth(path)
        if readings is not None:
            growth.readings = dict(readings)
        if loss is not None:
            growth.loss, growth.accuracy = loss, accuracy
            growth.counterfactual_count += 1
            earns = loss.mean - self.rent_of(path) > 0
            growth.probation_count = growth.probation_count + 1 if earns else 0

    # --- Structure ---

    def structure(self) -> list[dict[str, Any]]:
        """What grows where, as JSON-compatible data; with `module.state_dict()` it is the plane's whole state."""
        return [{"path": path, **growth.to_dict()} for path, growth in self.growths.items()]

    def rebuild(self, structure: Iterable[Mapping[str, Any]]) -> None:
        """Grow what `structure` describes, in place of what grows now; weights are initial until loaded.

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
                if growth.ramping or waits_for_steps(growth.stage):
                    self._watch(path)

    def __deepcopy__(self, memo: dict[int, Any]) -> Plane:
        """An independent plane over an independent host; the registry is shared, listeners stay behind."""
        twin = object.__new__(Plane)
        memo[id(self)] = twin
        memo[id(self.registry)] = self.registry
        for name, value in self.__dict__.items():
            setattr(twin, name, [] if name == "_listeners" else copy.deepcopy(value, memo))
        return twin

    # --- Inside ---

    def _must(self, command: Command, *, gated: bool = True) -> StageChange:
        change = self.apply(command, gated=gated)
        assert change is not None
        return change

    def _check_germination(self, command: Command, growth: Growth) -> None:
        if growth.embargo_left > 0:
            raise IllegalCommand(f"germinate at {command.slot}: under embargo for {growth.embargo_left} decisions more")
        if not command.blueprint:
            raise BadOption(f"germinate at {command.slot} without a blueprint", "the name of one")
        parse_blend(command.blend or self.blends[0], self.registry)
        spec = self.candidates.get(command.blueprint)
        if spec is not None and spec.family in growth.barren:
            raise IllegalCommand(
                f"germinate {command.blueprint} at {command.slot}: a seed of family {spec.family} was useless there",
                f"another family, or {growth.barren[spec.family]} decisions more",
            )
        self._check_budget((command,))

    def _check_budget(self, commands: Sequence[Command]) -> None:
        costs = [self.cost(command.slot, command.blueprint, command.options) for command in commands]
        params, flops = (sum(cost) for cost in zip(*costs, strict=True))
        ledger, where = self.ledger, ", ".join(command.slot for command in commands)
        for what, cost, used, limit in (
            ("parameters", params, ledger.seed_params, self.limits.params),
            ("FLOPs", flops, ledger.seed_flops, self.limits.flops),
        ):
            if limit is not None and used + cost > limit:
                raise IllegalCommand(
                    f"germinate {commands[0].blueprint} at {where}: {used:,} + {cost:,} {what}",
                    f"at most {limit:,}",
                    f"--budget-{'params' if what == 'parameters' else 'flops'} with more",
                )

    def cost(self, path: str, blueprint: str, options: Mapping[str, Any] = MappingProxyType({})) -> tuple[int, int]:
        """Parameters and forward FLOPs (one example) of a seed of `blueprint` at `path`, by the blueprint's estimate.

        Raises:
            UnknownName: no such blueprint.
            IllegalCommand: the blueprint does not fit the point.
        """
        key = (path, blueprint, *nursery.cost_key(self, path, blueprint, options))
        if key not in self._costs:
            self._costs[key] = nursery.estimate(self, path, blueprint, options)
        return self._costs[key]

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
            growth.options = nursery.blueprint_options(self, command.blueprint, command.options)
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
            self._watch(command.slot)
        if after.spec.permanent:  # behind a copy stands a block of the host again, at which more may grow
            height = height_of(command.slot) + 2
            self._territory.offer_stack(command.slot, max(self.max_stack, height) if slot.whole else self.max_stack)
        return StageChange(command.slot, before, after, command, blueprint, blend, added, removed, inherits, slot.whole)

    def _tell(self, change: StageChange) -> None:
        for listener in self._listeners:
            listener(change)

    def _choose_blend(
        self, command: Command, slot: SeedSlot, growth: Growth
    ) -> tuple[tuple[nn.Parameter, ...], tuple[nn.Parameter, ...]]:
        """Take up the blend that an ADVANCE into BLENDING names, if it differs from the one chosen at birth."""
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
        self._watch(command.slot)

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
                return changes
            command = Command(Op.ADVANCE, path, source="plane", reason=transition.gates[-1].summary)
            changes.append(self._take(transition, command))
            self._tell(changes[-1])

    def _watch(self, path: str) -> None:
        """Have `step` look at the slot at `path`, for which time does something."""
        self._moving[path] = self.growths[path], self._slots[path], None

    def _begin_ramp(self, path: str) -> Shares:
        growth, slot, _ = self._moving[path]
        blend = parse_blend(growth.blend, self.registry)
        key = blend.curve, growth.ramp_steps
        if key not in self._shares:
            self._shares[key] = Shares(blend.build_curve(self.registry), growth.ramp_steps)
        self._moving[path] = growth, slot, self._shares[key]
        return self._shares[key]

    def _set_alpha(self, path: str, value: float) -> None:
        self.growths[path].alpha = value
        self._slots[path].set_alpha(value)

    def _cull_inside(self, command: Command) -> tuple[nn.Parameter, ...]:
        """Empty a slot; every seed nested in its own is culled too, innermost first, and told of like any other.

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
            self._tell(change)
        return own

    def _remove_seed(self, path: str) -> tuple[nn.Parameter, ...]:
        """Empty the slot and everything nested in its seed; returns the parameters that are gone."""
        slot = self._slots[path]
        gone = list(_own_parameters(slot))
        for child in reversed(self._territory.children(path)):
            gone += list(_own_parameters(self._slots[child]))
            self._moving.pop(child, None)
            self._territory.unmount(child)
        slot.seed = slot.combination = None
        slot.whole = slot.wants_call = False
        slot.set_stage(EMPTY)
        self._set_alpha(path, 0.0)
        self._moving.pop(path, None)
        return tuple({id(p): p for p in gone}.values())


def _own_parameters(slot: SeedSlot) -> Iterable[nn.Parameter]:
    for module in (slot.seed, slot.combination):
        if module is not None:
            yield from module.parameters()
