"""Several processes that train one model, started by torchrun: what they exchange, and how they agree.

Every process runs the same loop over its own rows of each batch. Figures go through a gloo group of their own on the
CPU, so that no exchange of them waits for a GPU; gradients and parameters go through the default group.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from esper_core.kasmina.ranks import RankFault, Ranks
from esper_core.kasmina.scoring import BadScores
from esper_core.leyline.errors import EsperError, RunFailed
from esper_core.leyline.host import Batch, HostProtocol, rows_of
from esper_core.tolaria.faults import PART_FAULTS, DataFailed
from esper_core.tolaria.sharding import ShardingConfig

_FAULT, _DATA, _ENDS = 1, 2, 3
"""Kinds of errors by which a block ends, the last of which wins: a part's, a split's, and one that ends the run."""

AGAIN: Final = "esper resume continues from the newest checkpoint"

_PASSING: Final = -1
"""In place of a kind: the process is in the middle of its passes, and has norms to add up."""


PORTION: Final = 256 << 20
"""Bytes of a module that are sent together when it is placed, so that no second copy of all of it is needed."""


class RankLost(RunFailed):
    """The connection to another process broke, most likely because that process ended."""


@attrs.frozen
class Meeting:
    """What the processes know of one step before it begins.

    Attributes:
        share: this process's rows over all rows of the batch; 0 where its rows only stand in.
        examples, targets: of the whole batch. least: rows of the process with the fewest.
        more: whether every process has a batch. fine: whether all of them are finite.
        signal: number of the signal that asked one of them to stop; 0 for none.
        unread: the first process that could not read its data; -1 for none.
    """

    share: float
    examples: int
    targets: int
    least: int
    more: bool
    fine: bool
    signal: int
    unread: int


class ProcessGroup(Ranks):
    """Processes that each hold the whole model (`ddp`).

    Args:
        device: where this process trains. again: what continues what they do when one of them was lost.
        patience: how long to wait for another's figures; None for torch's 30 minutes.

    Attributes:
        version: counts modules that were placed, so that lists of parameters can be renewed when it changes.
        lost: a process is gone, and nothing can be exchanged any more.
        likeness: what makes processes hold the same.
    """

    likeness = "a host, seeds and data that depend on the seed alone; then esper resume"

    def __init__(self, device: torch.device, again: str = AGAIN, patience: timedelta | None = None) -> None:
        self.again = again
        self.device, self.rank, self.size = device, dist.get_rank(), dist.get_world_size()
        self.version, self.lost = 0, False
        self._control: Any = dist.new_group(backend="gloo", timeout=patience)
        self._norms: Any = dist.new_group() if device.type == "cuda" else None
        self._issued = 0  # exchanges of norms in these passes, where they do not wait for one another

    # --- Figures ---

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """A block of exchanges. What torch raises in it becomes `RankLost`, which ends the run."""
        try:
            yield
        except EsperError:
            raise
        except RuntimeError as error:
            self.lost = True
            told = str(error).strip().splitlines()[0][:200]
            broken = "a process of the run is gone" if _is_broken(told) else f"an exchange of processes failed: {told}"
            raise RankLost(
                f"{broken}, says process {self.rank} of {self.size}", "every process alive", self.again
            ) from error

    def share(self, value: Any = None) -> Any:
        """See `Ranks`."""
        data = json.dumps(value).encode() if self.first else b""
        with self.exchange():
            size = torch.tensor([len(data)])
            dist.broadcast(size, 0, group=self._control)
            text = torch.frombuffer(bytearray(data or bytes(int(size))), dtype=torch.uint8)
            dist.broadcast(text, 0, group=self._control)
        return json.loads(text.numpy().tobytes())

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """See `Ranks`."""
        mine = torch.tensor(values, dtype=torch.float64)
        found = torch.empty(self.size * len(mine), dtype=torch.float64)
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its newer name
        with self.exchange():
            gather(found, mine, group=self._control)
        rows: list[list[float]] = found.view(self.size, -1).tolist()
        return rows

    def gather_texts(self, text: str) -> list[str]:
        """One text of every process, by process."""
        data = text.encode()
        longest = int(max(row[0] for row in self.gather([len(data)])))
        rows = self.gather([len(data), *data, *bytes(longest - len(data))])
        return [bytes(map(int, row[1 : 1 + int(row[0])])).decode() for row in rows]

    def add_up(self, tensor: Tensor) -> Tensor:
        """See `Ranks`. Float64 on the way."""
        whole = tensor.detach().to("cpu", torch.float64, copy=True).contiguous()
        with self.exchange():
            dist.all_reduce(whole, group=self._control)
        return whole.to(tensor.device, tensor.dtype if tensor.is_floating_point() else torch.float64)

    def add_up_(self, tensor: Tensor) -> Tensor:
        """See `Ranks`."""
        with self.exchange():
            dist.all_reduce(tensor)
        return tensor

    def gather_bytes(self, tensor: Tensor) -> list[Tensor]:
        """A uint8 tensor of every process, by process; all of one length."""
        mine = tensor.detach().cpu().contiguous()
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self.exchange():
            dist.all_gather(found, mine, group=self._control)
        return found

    def gather_objects(self, value: Any) -> list[Any]:
        """See `Ranks`. The processes of one run trust one another, as pickles demand."""
        found: list[Any] = [None] * self.size
        with self.exchange():
            dist.all_gather_object(found, value, group=self._control)
        return found

    # --- Agreement ---

    @contextmanager
    def together(self, token: Callable[[], int] = lambda: 0, *, forward: bool = True) -> Iterator[list[int]]:
        """See `Ranks`.

        Args:
            token: called at the end; what it answers on every process is in the list that the context gives.
        """
        tokens: list[int] = []
        error: BaseException | None = None
        self._issued = 0
        try:
            yield tokens
        except PART_FAULTS as raised:
            error = raised
        if isinstance(error, RankLost):
            raise error
        while True:
            rows = self.gather([_kind(error), token() if error is None else 0, self._issued, 0])
            if all(row[0] != _PASSING for row in rows):  # else that process learns of this one's error, and comes here
                break
        for _ in range(int(max(row[2] for row in rows)) - self._issued):  # those that wait on the device
            self._add_up_on_device(torch.zeros(3, device=self.device))
        tokens += [int(row[1]) for row in rows]
        worst = max(int(row[0]) for row in rows)
        if not worst:
            return
        texts = self.gather_texts("" if error is None else f"{type(error).__name__}: {error}"[:500])
        culprit = next(number for number, row in enumerate(rows) if int(row[0]) == worst)
        if error is not None and _kind(error) == worst:
            raise error
        told = f"process {culprit}: {texts[culprit]}"
        if worst == _ENDS:
            raise RunFailed(told) from error
        if worst == _DATA:
            raise DataFailed("validation", RankFault(told)) from error
        raise RankFault(told) from error

    def add_up_norms_in_pass(self, norms: Tensor) -> Tensor:
        """See `Ranks`.

        Raises:
            RankFault: another process raised in its passes. Where norms are on a GPU this one is told at their end.
        """
        if self._norms is not None:
            self._issued += 1
            return self._add_up_on_device(norms.square()).sqrt()
        rows = self.gather([_PASSING, *norms.double().square().tolist()])
        if any(row[0] != _PASSING for row in rows):
            raise RankFault("another process raised")
        return torch.tensor([row[1:] for row in rows], dtype=torch.float64).sum(0).sqrt().to(norms.dtype)

    def _add_up_on_device(self, squares: Tensor) -> Tensor:
        with self.exchange():
            dist.all_reduce(squares, group=self._norms)
        return squares

    def meet(self, batch: Batch | None, *, fine: bool, signal: int, unread: bool) -> Meeting:
        """Begin a step: None for a process whose data are at their end, or could not be read."""
        has, counted = batch is not None, batch is not None and batch.counted
        size, targets = (batch.size, batch.targets.numel()) if batch is not None else (0, 0)
        rows = self.gather([has, size * counted, targets * counted, fine, signal, unread, size])
        examples = int(sum(row[1] for row in rows))
        return Meeting(
            share=rows[self.rank][1] / max(1, examples),
            examples=examples,
            targets=int(sum(row[2] for row in rows)),
            least=int(min(row[6] for row in rows)),
            more=all(row[0] for row in rows),
            fine=all(row[3] for row in rows),
            signal=int(max(row[4] for row in rows)),
            unread=next((number for number, row in enumerate(rows) if row[5]), -1),
        )

    def mine(self, batch: Batch) -> Batch:
        """See `Ranks`."""
        rows, counted = rows_of(batch.size, self.rank, self.size)
        return attrs.evolve(batch.map(lambda t: t[rows]), counted=counted)

    # --- Random numbers ---

    def part_ways(self, seed: int) -> None:
        """Draw other random numbers than the first process, for dropout and the like; births draw alike."""
        if not self.first:
            torch.manual_seed(zlib.crc32(f"{seed}|process {self.rank}".encode()))

    def with_every_random(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` with the states of every process's generators: that of process 2 is `random.cpu.2`."""
        found = dict(tensors)
        for name in [n for n in tensors if n.rpartition(".")[0].rpartition(".")[2] == "random"]:
            for number, state in enumerate(self.gather_bytes(tensors[name])):
                if number:
                    found[f"{name}.{number}"] = state
        return found

    # --- Parameters ---

    def compute_in(self, dtype: torch.dtype | None, sharding: ShardingConfig) -> None:
        """Take note of the dtype of autocast, None for full precision, and of how parameters are sharded."""

    def spread(self, host: HostProtocol) -> None:
        """Place the host, which was built alike on every process."""
        self.settle(host.module)

    def settle(self, module: nn.Module) -> None:
        """See `Ranks`. Every process takes the values of the first: a factory may draw numbers of its own."""
        self.version += 1
        self.take_from_first((*module.parameters(), *module.buffers()))

    @torch.no_grad()
    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors, of the same shapes everywhere, the values of the first process, in place."""
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault(tensor.dtype, []).append(tensor.detach())
        with self.exchange():
            for alike in groups.values():
                for some in _in_portions(alike):
                    self._broadcast(some)

    def _broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors of one dtype the values that the first process has."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.broadcast(flat, 0)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()

    @torch.no_grad()
    def average_running(self, running: Iterable[tuple[nn.Module, list[Tensor]]]) -> None:
        """Take the mean over the processes of the running statistics of modules in training, see `running_of`."""
        buffers = [buffer for module, held in running if module.training for buffer in held]
        if not buffers:
            return
        flat = torch.cat([buffer.reshape(-1).float() for buffer in buffers]) / self.size
        self.add_up_(flat)
        parts = torch.split(flat, [buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view(b.shape) for part, b in zip(parts, buffers, strict=True)])

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a tensor of which this process may hold a part."""
        return tensor

    # --- Likeness ---

    def compare(self, named: Mapping[str, Tensor], plain: Mapping[str, Any], step: int) -> None:
        """Make sure that every process holds the same.

        Args:
            named: tensors that are the same to the bit on every process, by name. plain: JSON-compatible data.

        Raises:
            RunFailed: they differ; the message names the place.
        """
        sums = {kind: self._sums(named, kind) for kind in {t.device.type for t in named.values()}}
        marks = {name: mark for found in sums.values() for name, mark in found.items()}
        marks |= {key: zlib.crc32(json.dumps(value, sort_keys=True).encode()) for key, value in plain.items()}
        names = sorted(marks)
        text = ";".join(f"{name}={marks[name]:x}" for name in names).encode()
        digests = self.gather([zlib.crc32(text), len(names)])
        if all(digest == digests[0] for digest in digests):
            return
        tables = [dict(item.split("=") for item in one.split(";")) for one in self.gather_texts(text.decode())]
        for number, table in enumerate(tables):
            for name in sorted({*table, *tables[0]}):
                if table.get(name) != tables[0].get(name):
                    raise RunFailed(
                        f"processes 0 and {number} differ in {name} at step {step}",
                        "processes that hold the same model",
                        self.likeness,
                    )

    @torch.no_grad()
    def _sums(self, named: Mapping[str, Tensor], kind: str) -> dict[str, int]:
        """A number for each tensor on one kind of device, from the bits of all its elements; waits once."""
        mine = {name: tensor for name, tensor in named.items() if tensor.device.type == kind and tensor.numel()}
        if not mine:
            return {}
        marks: list[int] = torch.stack([_mark(tensor.detach()) for tensor in mine.values()]).tolist()
        return dict(zip(mine, marks, strict=True))


def _in_portions(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, in lists of at least `PORTION` bytes but for the last: a copy of a list is small."""
    portion: list[Tensor] = []
    size = 0
    for tensor in tensors:
        portion.append(tensor)
        size += tensor.numel() * tensor.element_size()
        if size >= PORTION:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _is_broken(told: str) -> bool:
    """Whether an error of torch is about a connection."""
    return any(word in told.lower() for word in ("connection", "peer", "read error", "write error", "timed out"))


def _mark(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits taken as integers, int64 0-dim: exact in whatever order it is added."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    if tensor.is_complex() or width is None:
        return _mark(torch.view_as_real(tensor) if tensor.is_complex() else tensor.float())
    return tensor.contiguous().view(width).sum(dtype=torch.int64)


def _kind(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, DataFailed):
        return _DATA
    return _ENDS if isinstance(error, EsperError) and not isinstance(error, BadScores) else _FAULT


def pick_random(tensors: Mapping[str, Tensor], ranks: Ranks, seed: int) -> dict[str, Tensor]:
    """The states of this process's generators among those of every process, by the names of a single process.

    If a run is resumed with another number of processes, those after the first get new states.
    """
    found, count = dict(tensors), 1
    prefix = "random.cpu."
    count += sum(name.startswith(prefix) and name[len(prefix) :].isdecimal() for name in tensors)
    for name in [n for n in tensors if n.startswith("random.") and n.count(".") == 2]:
        del found[name]
    if ranks.rank == 0:
        return found
    for name in [n for n in found if n.startswith("random.")]:
        if count == ranks.size:
            found[name] = tensors[f"{name}.{ranks.rank}"]
        else:
            state = torch.Generator().manual_seed(zlib.crc32(f"{seed}|process {ranks.rank}".encode())).get_state()
            if name == "random.cpu":
                found[name] = state
    return found
