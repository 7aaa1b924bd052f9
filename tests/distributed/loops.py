"""Training loops of a caller's own, in one process and in several."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esper_core.leyline.errors import EsperError
from esper_core.tolaria.grow import accompany, grow
from esper_core.tolaria.progress_file import Progress
from esper_core.tolaria.session import Tolaria
from esper_core.tolaria.snapshot import model_tensors
from tests.distributed.runs import registry

ROWS = 8
"""Examples in a step, of all processes together."""


class Net(nn.Module):
    """Two blocks between an embedding and a head, in float64."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 12)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(2))
        self.norm = nn.BatchNorm1d(12) if norm else nn.Identity()
        self.head = nn.Linear(12, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def data(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of which every process takes its rows."""
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    drawn = [torch.randn(ROWS, 6, generator=generator, dtype=torch.float64) for _ in range(steps)]
    return [(x, (x.sin() @ teacher).argmax(1)) for x in drawn]


def rows(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Those of this process."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    count = len(batch[0])
    share = slice(rank * count // size, (rank + 1) * count // size)
    return batch[0][share], batch[1][share]


def start(model: nn.Module, optimizer: Any, steps: int, plan: str, events: list[Any], **options: Any) -> Tolaria:
    """`accompany`, with a schedule of commands."""
    return accompany(
        model, optimizer, rows(data(1)[0]), steps=steps, decisions=steps // 5, emit=events.append, registry=registry(),
        controller=plan, blueprints=["ffn", "bottleneck_adapter", "bomb"], points=["blocks.0", "blocks.1"],
        budget_params="", settings={"governor.check_every": 5, "governor.settle": 10, "governor.warmup": 10,
                                    "governor.streak": 4, "governor.recent": 4}, **options,
    )  # fmt: skip


def outcome(tolaria: Tolaria, events: list[Any]) -> dict[str, Any]:
    """What the model holds at the end, and what happened."""
    held = model_tensors(tolaria.plane)
    digest = hashlib.sha256(json.dumps(tolaria.plane.structure(), sort_keys=True).encode())
    for _, tensor in sorted(held.items()):
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    told = [[e.kind, e.step] for e in events if e.kind in ("stage_changed", "rolled_back", "governor_alarm", "fault")]
    return {
        "digest": digest.hexdigest(), "told": told, "seeds": tolaria.plane.ledger.seed_params,
        "weights": {n: t.detach().double().flatten().tolist() for n, t in held.items()},
        "flops": tolaria.clock.total_flops,
        "validation": [v for _, v, _ in tolaria.clock.history], "trained": [t for t, _, _ in tolaria.clock.history],
    }  # fmt: skip


def train(
    folder: str, plan: str, steps: int = 60, accumulate: int = 1, shards: bool = True, halt: int = 0, norm: bool = False
) -> dict[str, Any]:
    """Losses of every step, and what the model holds at the end.

    `shards`: each process measures its part of the validation batches, and not all of them. `halt`: a step at which
    the loop is left, and gone on with from a checkpoint.
    """
    several = int(os.environ["WORLD_SIZE"]) > 1
    if several:
        dist.init_process_group("gloo")
    losses: list[float] = []
    events: list[Any] = []
    kept: dict[str, Any] = {}
    try:
        tolaria = model = None
        for part in ([0, halt], [halt, steps]) if halt else ([0, steps],):
            model = Net(norm)
            wrapped = DistributedDataParallel(model) if several else model
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            tolaria = start(wrapped, optimizer, steps, plan, events, accumulate=accumulate)
            if kept:
                model.load_state_dict(kept["model"])
                Progress(tolaria).load_state_dict(kept["growth"])
            losses += _loop(wrapped, optimizer, tolaria, data(steps)[slice(*part)], steps, accumulate, shards)
            if not several or dist.get_rank() == 0:  # as a loop saves: the first process alone
                kept = {"model": model.state_dict(), "growth": Progress(tolaria).state_dict()}
                torch.save(kept, Path(folder) / f"{several}.pt")
            if several:
                dist.barrier()
            kept = torch.load(Path(folder) / f"{several}.pt")
        assert tolaria is not None
        tolaria.conclude()
        return {**outcome(tolaria, events), "losses": losses}
    finally:
        if several:
            dist.destroy_process_group()


def _loop(model: nn.Module, optimizer: Any, tolaria: Tolaria, batches: Any, steps: int, accumulate: int,
          shards: bool) -> list[float]:  # fmt: skip
    losses = []
    criterion = nn.CrossEntropyLoss()
    validation = data(3)
    for batch in batches:
        whole = zip(*(tensor.chunk(accumulate) for tensor in batch), strict=True)
        parts = [rows((x, y)) for x, y in whole]  # a pass is of the same rows, however many processes share them
        each = []
        for x, y in parts:
            loss = criterion(model(x), y)
            (loss / accumulate).backward()
            each.append(loss.detach())
        optimizer.step()
        tolaria.step(torch.stack(each).mean(), sum(len(y) for _, y in parts))
        optimizer.zero_grad()
        losses.append(float(torch.stack(each).mean()))
        if tolaria.due(steps):
            tolaria.decide([tolaria.convert(rows(b) if shards else b) for b in validation], 0.0)  # type: ignore[misc]
    return losses


def refusals() -> dict[str, str]:
    """The messages with which ways to train by several processes are refused; empty for one that is not."""
    found = {"unmet": _refusal("unmet")}
    dist.init_process_group("gloo")
    try:
        return found | {kind: _refusal(kind) for kind in ("plain", "grow", "fsdp", "allocate", "past")}
    finally:
        dist.destroy_process_group()


def _refusal(kind: str) -> str:
    model: Any = Net()
    try:
        if kind == "grow":
            grow(model, data(2), data(2), epochs=1)
        elif kind == "past":  # the model is wrapped, and trained without its wrapper
            return _past(model)
        elif kind == "fsdp":
            from torch.distributed.fsdp import fully_shard

            fully_shard(model)
        elif kind == "allocate":
            model = DistributedDataParallel(model)
        options = {"allocate": "need"} if kind == "allocate" else {}
        accompany(model, torch.optim.SGD(model.parameters(), lr=0.1), data(1)[0], steps=9, **options)
    except EsperError as error:
        return str(error)
    return ""


def _past(model: Net) -> str:
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tolaria = accompany(wrapped, optimizer, rows(data(1)[0]), steps=9)
    inputs, targets = rows(data(1)[0])
    loss = nn.functional.cross_entropy(model(inputs), targets)
    loss.backward()
    optimizer.step()
    try:
        tolaria.step(loss, len(targets))
    except EsperError as error:
        return str(error)
    return ""
