"""The tree of slots: mounted at points of the host or of a seed, or stacked, in depth order."""

from __future__ import annotations

from typing import Any

from torch import nn

from esper_core.kasmina.growth import Growth
from esper_core.kasmina.paths import base_of, height_of
from esper_core.kasmina.placement import device_of
from esper_core.kasmina.slot import SeedSlot, SlotStack
from esper_core.leyline.errors import UnknownName, did_you_mean
from esper_core.leyline.host import HostProtocol


class Territory:
    """The slots of one host, those nested in its seeds included.

    A path is `point`, `point+1` for the slot stacked upon it, and `path/inner` for a point of the seed at `path`.

    Attributes:
        module: holds one `SlotStack` a point, beside the host and not inside it.
        slots, growths: by path, in depth order.
    """

    def __init__(self, host: HostProtocol) -> None:
        self.host = host
        self.module = nn.Module()
        self.slots: dict[str, SeedSlot] = {}
        self.growths: dict[str, Growth] = {}
        self._owners: dict[str, HostProtocol] = {}
        self._nested = 0  # slots inside seeds; most planes have none, and may have a thousand others to look through

    def growth(self, path: str) -> Growth:
        """The state of the slot at `path`.

        Raises:
            UnknownName: no such slot.
        """
        if path not in self.growths:
            hint = did_you_mean(path, self.growths) or f"one of {', '.join(list(self.growths)[:8])}"
            raise UnknownName(f"no slot {path!r}", "the path of a slot", hint)
        return self.growths[path]

    def mount(self, owner: HostProtocol, point: str, path: str, after: str = "") -> None:
        """Give `owner` a slot at its `point`; it is inserted after `after`, or last."""
        slot = SeedSlot(path, owner.injection_specs[point]).to(device_of(self.host.module))
        stack = SlotStack(slot)
        owner.register_slot(point, stack)
        self.module.add_module(key_of(path), stack)
        self._owners[path] = owner
        self._nested += owner is not self.host
        self._insert(path, slot, after)

    def mount_children(self, path: str) -> None:
        """If the seed at `path` is itself a host, give each of its points a slot."""
        seed: object = self.slots[path].seed
        if isinstance(seed, HostProtocol):
            specs, previous = seed.injection_specs, path
            for name in sorted(specs, key=lambda n: (specs[n].order, n)):
                child = f"{path}/{name}"
                self.mount(seed, name, child, after=previous)
                previous = child

    def children(self, path: str) -> list[str]:
        """Paths of the slots nested in the seed at `path`, at any depth, in depth order."""
        return [p for p in self.slots if p.startswith(path + "/")] if self._nested else []

    def stack(self, path: str) -> None:
        """Put an empty slot `base+n` upon the slots of `base`.

        Raises:
            UnknownName: no such base.
        """
        base = base_of(path)
        if base == path or base not in self._owners:
            raise UnknownName(f"no slot {path!r} in this host", f"one of {', '.join(list(self.slots)[:8])}")
        stack = self.module.get_submodule(key_of(base))
        assert isinstance(stack, SlotStack)
        last = stack.slots[-1]
        assert isinstance(last, SeedSlot)
        slot = SeedSlot(path, last.spec).to(device_of(self.host.module))
        stack.slots.append(slot)
        self._insert(path, slot, [last.path, *self.children(last.path)][-1])

    def offer_stack(self, path: str, limit: int) -> None:
        """Put an empty slot upon `path`, unless one is there or `limit` slots are."""
        base = base_of(path)
        number = height_of(path) + 1
        if number < limit and f"{base}+{number}" not in self.slots:
            self.stack(f"{base}+{number}")

    def unmount(self, path: str) -> None:
        """Remove the slot at `path`; its owner then computes what it did before."""
        if path in self._owners:
            owner = self._owners.pop(path)
            owner.unregister_slot(path.rsplit("/", 1)[-1])
            self._nested -= owner is not self.host
            delattr(self.module, key_of(path))
        elif base_of(path) in self._owners:
            stack = self.module.get_submodule(key_of(base_of(path)))
            assert isinstance(stack, SlotStack)
            stack.slots = nn.ModuleList([slot for slot in stack.slots if slot is not self.slots[path]])
        del self.slots[path], self.growths[path]

    def _insert(self, path: str, slot: SeedSlot, after: str) -> None:
        last = next(reversed(self.slots), "")
        order = list(self.slots) if after and after != last else []
        self.slots[path], self.growths[path] = slot, Growth()
        if not order:  # it comes last as it is
            return
        order.insert(order.index(after) + 1, path)
        _reorder(self.slots, order)
        _reorder(self.growths, order)


def _reorder(table: dict[str, Any], order: list[str]) -> None:
    """In place, since views of the tables are handed out."""
    entries = {path: table[path] for path in order}
    table.clear()
    table.update(entries)


def key_of(path: str) -> str:
    """A module name for `path`: torch reserves the dot."""
    return path.replace(".", ":")
