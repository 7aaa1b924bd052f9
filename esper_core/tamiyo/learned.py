"""The learned controller, `agent:FILE`: a trained core, with an adapter if one is given, decides."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Final

import torch

from esper_core.leyline.actions import Command
from esper_core.leyline.errors import BadFile, BadOption, did_you_mean
from esper_core.leyline.investment import Investment
from esper_core.leyline.stages import Op
from esper_core.leyline.view import RunView
from esper_core.registry import Registry, load_registry
from esper_core.tamiyo.adapter import AdapterFile, load_adapter
from esper_core.tamiyo.advice import Adviser
from esper_core.tamiyo.blend_probe import BlendProbe
from esper_core.tamiyo.core import TamiyoCore
from esper_core.tamiyo.observation import FIELDS, OPS, ObservationBatch, collate, observe

SHIPPED_CORES = ("core_v1", "core_v2")
"""Cores that come with the package, by the name that `agent:NAME` takes; the last is used when no file is named."""
SHIPPED = f"{SHIPPED_CORES[-1]}.safetensors"
"""The file of the core that is used when no file is named."""
SHIPPED_ADAPTERS = ("language", "vision")
"""Domains whose adapters come with the package."""
ADAPTED_CORE = "core_v1"
"""The core that these belong to: it is used when one of them is named, and no core."""

_SLOTS_A_COMMAND: Final = 4
"""Slots of a run for each command of a decision, where that is more than the core was trained with."""


@contextmanager
def agent_path(path: str) -> Iterator[Path]:
    """`path` itself, the shipped core if `path` is empty, or the shipped core or adapter that it names.

    Raises:
        BadFile: none is shipped with this installation.
    """
    named = path in (*SHIPPED_CORES, *SHIPPED_ADAPTERS) and not Path(path).exists()
    if path and not named:
        yield Path(path)
        return
    resource = files("esper_core.tamiyo") / (f"{path}.safetensors" if named else SHIPPED)
    if not resource.is_file():
        raise BadFile("this installation ships no trained agent", "agent:FILE", "esper tamiyo train")
    with as_file(resource) as shipped:
        yield shipped


def load_agent(path: str) -> TamiyoCore:
    """The core in `path`, or the shipped one if `path` is empty.

    Raises:
        BadFile: damaged, hostile, or none is shipped with this installation.
    """
    with agent_path(path) as file:
        return TamiyoCore.load(file)


def core_for(path: str, adapter: str) -> str:
    """The core to load for an adapter: `path`, or where it is empty and a shipped adapter is named, the adapter's."""
    shipped = adapter in SHIPPED_ADAPTERS and not Path(adapter).exists()
    return ADAPTED_CORE if shipped and not path else path


def open_adapter(name: str) -> AdapterFile:
    """The adapter in the file `name`, or the shipped one of the domain `name` where there is no such file.

    Raises:
        BadOption: it is neither. BadFile: damaged or hostile.
    """
    if Path(name).exists():
        return load_adapter(name)
    if name not in SHIPPED_ADAPTERS:
        raise BadOption(
            f"there is no adapter {name!r}",
            f"a file, or a domain of {', '.join(SHIPPED_ADAPTERS)}",
            did_you_mean(name, SHIPPED_ADAPTERS) or "esper tamiyo adapt --domain NAME",
        )
    with as_file(files("esper_core.tamiyo") / f"{name}.safetensors") as shipped:
        return load_adapter(shipped)


class LearnedController:
    """Decides with a trained core; the same view and memory give the same commands.

    Args:
        argument: path of an agent file, or the name of a shipped core; empty for the one that is used by default, or
            for the core of `adapter`.
        seed: of the draws, with `sample`.
        sample: draw from the policy instead of taking its likeliest command.
        adapter: path of an adapter file for this domain, or the domain of a shipped one, or empty.
        core: a core in memory instead of a file.
        commands: most commands a decision; 0 for as many as the core was trained with, or one for every four slots of
            the run if that is more. Slots of a large host would otherwise wait for their turn.

    Raises:
        BadFile: a file is damaged, or the adapter belongs to another core.
    """

    def __init__(
        self,
        argument: str = "",
        *,
        seed: int = 0,
        sample: bool = False,
        adapter: str = "",
        core: TamiyoCore | None = None,
        commands: int = 0,
        registry: Registry | None = None,
    ) -> None:
        self._default = core is None and not argument and not adapter
        self._use(core or load_agent(core_for(argument, adapter)))
        if adapter:
            self.core.attach(open_adapter(adapter))
        self.generator = torch.Generator().manual_seed(seed) if sample else None
        self.commands = commands
        self._wished = 0  # parameters of all seeds: the most that `invest` has asked for
        self._probe = BlendProbe(registry or load_registry())

    def _use(self, core: TamiyoCore) -> None:
        """Decide with `core`, from the start of a run."""
        self.core = core
        self.core.eval()
        self.hidden = core.initial(1)
        self._adviser = Adviser() if core.config.advised else None

    @torch.no_grad()
    def decide(self, view: RunView) -> Sequence[Command]:
        """See `Controller.decide`. It waits at the last decision of a run, which has no effect."""
        if view.decision + 1 >= view.decisions:
            return ()
        advised = view if self._adviser is None else self._adviser.advise(view)
        seen = observe(advised, self._probe.descriptors(view.blends))
        most = self._most(view)
        decision = self.core.decide(collate([seen]), self.hidden, generator=self.generator, commands=most)
        self.hidden = decision.hidden
        reason = f"expected return from here {decision.value.item():+.3f}"
        rows = decision.actions[0].tolist()
        return [seen.command(row, "agent", reason) for row in rows if OPS[row[FIELDS.index("op")]] is not Op.WAIT]

    @torch.no_grad()
    def invest(self, view: RunView, efficiency: Mapping[str, float | None]) -> Investment:
        """For Narset: shares by where the core wishes to germinate, times what each region has earned.

        The wish is that of a first command. Until something is measured, the commands that it would give if regions had
        no budgets count too: the later ones know of the earlier ones, and may go elsewhere. After that they would hide
        what was earned in regions where it plants nothing.

        The total is what has grown, and of the rest of the run's budget the share by which the core would rather
        germinate than wait; None in a run without a budget. It never falls: that the core waits now is a matter of this
        decision, and what it wished to spend earlier is not withdrawn.
        """
        # A copy is asked: this is no decision yet, and the view at the decision may be narrower.
        advised = view if self._adviser is None else copy.deepcopy(self._adviser).advise(view)
        seen = collate([observe(advised, self._probe.descriptors(view.blends))])
        spread, drive = self.core.wishes(seen, self.hidden)
        wishes = spread[0].tolist()
        if all(value is None for value in efficiency.values()):
            for number in self._planned(seen, self._most(view)):
                wishes[number] += 1.0
        shares, whole = dict.fromkeys(efficiency, 0.0), math.fsum(wishes) or 1.0
        for slot, wish in zip(view.slots, wishes, strict=True):
            shares[slot.spec.region] = shares.get(slot.spec.region, 0.0) + wish / whole
        left = view.params_left
        total = None
        if left is not None:
            self._wished = max(self._wished, view.seed_params + math.ceil(drive.item() * max(left, 0)))
            total = self._wished
        if not any(shares.values()):
            return Investment(total)
        earned = {region: 1.0 if value is None else max(0.0, value) for region, value in efficiency.items()}
        weighed = {region: share * earned.get(region, 1.0) for region, share in shares.items()}
        return Investment(total, weighed if any(weighed.values()) else shares)

    def _most(self, view: RunView) -> int:
        """Most commands of a decision."""
        return self.commands or max(self.core.config.commands, math.ceil(len(view.slots) / _SLOTS_A_COMMAND))

    def _planned(self, seen: ObservationBatch, most: int) -> list[int]:
        """Numbers of the slots at which it would germinate now. Memory and generator stay as they are."""
        generator = None
        if self.generator is not None:
            generator = torch.Generator()
            generator.set_state(self.generator.get_state())
        rows = self.core.decide(seen, self.hidden, generator=generator, commands=most).actions[0].tolist()
        return [row[FIELDS.index("slot")] for row in rows if OPS[row[FIELDS.index("op")]] is Op.GERMINATE]

    def state_dict(self) -> dict[str, object]:
        """Memory, the generator's state if it draws, and the adviser's if it is advised."""
        random = self.generator.get_state().tolist() if self.generator is not None else []
        adviser = {} if self._adviser is None else {"adviser": self._adviser.state_dict()}
        memory = {"fingerprint": self.core.fingerprint, "hidden": self.hidden[0].tolist(), "random": random}
        return {**memory, **adviser, "wished": self._wished}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`, with the shipped core that decided the run where none was named.

        Raises:
            BadOption: the state is another core's.
        """
        if self._default and state["fingerprint"] != self.core.fingerprint:
            for core in map(load_agent, SHIPPED_CORES):
                if core.fingerprint == state["fingerprint"]:
                    self._use(core)
        if state["fingerprint"] != self.core.fingerprint:
            raise BadOption(f"the run was decided by core {str(state['fingerprint'])[:12]}", "the same agent file")
        self.hidden = torch.tensor([state["hidden"]], dtype=self.hidden.dtype)
        if self._adviser is not None:
            self._adviser.load_state_dict(state["adviser"])
        self._wished = int(state.get("wished", 0))  # runs of before kept none
        if self.generator is not None:
            self.generator.set_state(torch.tensor(state["random"], dtype=torch.uint8))
