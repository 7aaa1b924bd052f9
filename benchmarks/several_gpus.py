"""What several GPUs make of Esper: a GPT of 1.2 billion parameters that deepens in mid-run, and scaling at 124 million.

Run: python benchmarks/several_gpus.py billion|scaling [--processes 2] [--limit SECONDS] [--quick]
It starts its processes itself, needs no installation and no network, and prints one JSON object a line as it goes;
`--quick` is a dry run of tiny models on the CPU. Figures are of process 0; model FLOPs are 6 FLOPs a weight and token,
and 6·layers·width·length a token for causal attention, without what activation checkpointing computes again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / part) for part in ("", "hosts", "blueprints", "plugins")]  # runs without an installation
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # matrix products compute the same each time

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from esper_core.kasmina.ranks import Ranks  # noqa: E402
from esper_core.leyline.host import Batch  # noqa: E402
from esper_core.registry import Registry, load_registry  # noqa: E402
from esper_core.tolaria.checkpoint import Checkpoints  # noqa: E402
from esper_core.tolaria.config import RunConfig  # noqa: E402
from esper_core.tolaria.consult import compare_processes  # noqa: E402
from esper_core.tolaria.process_group import ProcessGroup  # noqa: E402
from esper_core.tolaria.processes import build, join, own_device  # noqa: E402
from esper_core.tolaria.run import build_trainer  # noqa: E402
from esper_core.tolaria.setup import set_up, spread  # noqa: E402
from esper_core.tolaria.trainer import Trainer  # noqa: E402
from esper_hosts.gpt import GPT  # noqa: E402
from esper_plugins.objectives.shared import token_loss  # noqa: E402
from esper_plugins.tasks.tokens import task_of_parts  # noqa: E402

PEAK = 989e12
"""Dense bf16 FLOP/s of an H100 or H200 (SXM), from NVIDIA's data sheet."""

_PLUGINS = (
    "esper_hosts.plugin", "esper_blueprints.plugin", "esper_plugins.blends.plugin", "esper_plugins.rewards.plugin",
    "esper_plugins.objectives.plugin", "esper_plugins.tasks.plugin", "esper_plugins.sinks.plugin",
    "esper_core.tamiyo.plugin", "esper_core.emrakul.plugin",
)  # fmt: skip


def parts() -> Registry:
    """The registry, with this repository's own plugins even where nothing is installed."""
    registry = load_registry()
    if not registry.specs("blueprint"):
        for name in _PLUGINS:
            registry.register(importlib.import_module(name), name=name)
    return registry


def tell(**values: Any) -> None:
    """Print one JSON object, from process 0 only."""
    if os.environ["RANK"] == "0":
        print(json.dumps(values), flush=True)


def wait() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call, of which every process begins together."""
    wait()
    dist.barrier()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def memory() -> float:
    """Peak of the allocator's memory so far, GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


@cache
def checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose activations are computed again in the backward pass."""

    def forward(self: Any, x: Tensor) -> Any:
        if self.training and torch.is_grad_enabled():
            return checkpoint(partial(kind.forward, self), x, use_reentrant=False, preserve_rng_state=False)
        return kind.forward(self, x)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def model_flops(weights: int, layers: int, width: int, length: int) -> float:
    """Training FLOPs of one token, see the head of this file."""
    return 6.0 * weights + 6.0 * layers * width * length


# --- The billion ---


def billion(limit: float, quick: bool) -> None:
    """A GPT of 12 blocks that deepens to 24 by copies, under fsdp2, bf16, activation checkpointing and compiling."""
    began = time.perf_counter()
    width, length, batch, layers = (64, 32, 8, 2) if quick else (2048, 1024, 64, 12)
    first, second = (6, 6) if quick else (120, 160)
    every = 3 if quick else 40
    with tempfile.TemporaryDirectory() as temporary:
        plan = Path(temporary) / "plan.json"
        grow = {"op": "germinate", "slot": f"blocks.{layers - 1}", "blueprint": "copy", "tempo": "instant",
                "options": {"blocks": "all"}, "decision": first // every - 1}  # fmt: skip
        plan.write_text(json.dumps({"steps": [grow], "advance": True}))
        config = RunConfig(
            host="gpt", task="stdlib", blueprints=("copy",), budget_params="", controller=f"schedule:{plan}",
            epochs=1, steps_per_epoch=first + second, decisions_per_epoch=(first + second) // every,
            batch_size=batch, learning_rate=3e-4, schedule="wsd", clip=1.0, amp="off" if quick else "bf16",
            compile="off" if quick else "blocks", strategy="fsdp2", decision_examples=2 * batch, warmup=0.1,
            settings={"gpt.width": width, "gpt.layers": layers, "gpt.heads": max(1, width // 128),
                      "stdlib.length": length, "governor.settle": 20},
        )  # fmt: skip
        ranks = join(own_device("auto"), "fsdp2")
        setup = set_up(config, parts(), ranks=ranks)
        host: Any = setup.plane.host.module
        for block in host.blocks:
            block.__class__ = checkpointed(type(block))
        ready = time.perf_counter() - began
        spreading = timed(lambda: spread(setup, ranks))
        trainer = build_trainer(setup, {}, keeps=True)
        tell(stage="ready", seconds_to_build=ready, seconds_to_shard=spreading, parameters=setup.plane.host_params,
             processes=ranks.size, peak_GiB=memory(), device=_name())  # fmt: skip
        trainer.tolaria.keep()
        _train(trainer, layers, width, length, batch, every)
        _pieces(trainer, Path(ranks.share(temporary)), began, limit)
        dist.barrier()
    tell(stage="done", seconds=time.perf_counter() - began, peak_GiB=memory())


def _train(trainer: Trainer, layers: int, width: int, length: int, batch: int, every: int) -> None:
    """The run itself: every stretch between decisions is timed as a whole, and every decision."""
    tolaria, plane = trainer.tolaria, trainer.tolaria.plane
    assert isinstance(trainer.ranks, ProcessGroup)
    batches, at = trainer._batches(), 0
    while at < trainer.timetable.steps:
        grown = plane.ledger.seed_params
        seen = tolaria.clock.epoch_loss_sum, tolaria.clock.epoch_loss_count
        seconds = [timed(lambda: trainer.step(next(batches)))]  # the first may compile
        rest = every - 1
        seconds.append(timed(lambda rest=rest: [_step(trainer, batches) for _ in range(rest)]) / rest)  # type: ignore[misc]
        trainer.position.batch += 1
        at += every
        deciding = timed(trainer.decide)
        clock = tolaria.clock
        loss = (clock.epoch_loss_sum - seen[0]) / max(1, clock.epoch_loss_count - seen[1])
        deep = layers * (2 if grown else 1)
        flops = model_flops(plane.host_params + grown, deep, width, length) * batch * length
        tell(stage="training", step=clock.step, layers=deep, parameters=plane.host_params + grown, train_loss=loss,
             validation_loss=trainer.position.validation_loss, first_step=seconds[0], step_seconds=seconds[1],
             tokens_a_second=batch * length / seconds[1], mfu=flops / seconds[1] / PEAK / trainer.ranks.size,
             decision_seconds=deciding, deepened=plane.ledger.seed_params > grown, peak_GiB=memory(),
             rollbacks=tolaria.governor.rollbacks)  # fmt: skip


def _step(trainer: Trainer, batches: Iterator[Batch]) -> None:
    trainer.step(next(batches))
    trainer.position.batch += 1


def _pieces(trainer: Trainer, folder: Path, began: float, limit: float) -> None:
    """What a snapshot and a checkpoint cost now, and whether the run goes on from the checkpoint."""
    tolaria, ranks = trainer.tolaria, trainer.ranks
    take = partial(tolaria.snapshot.take, tolaria.plane, tolaria.optimizer, tolaria.clock.step)
    tell(stage="snapshot", first=timed(take), again=timed(take))
    tell(stage="comparison of processes", seconds=timed(lambda: compare_processes(tolaria)))
    tell(stage="rollback", seconds=timed(lambda: tolaria.snapshot.restore(tolaria.plane, tolaria.optimizer)))
    if ranks.share(time.perf_counter() - began > 0.6 * limit):
        return tell(stage="checkpoint", left_out="no time")
    tolaria.snapshot.tensors = {}  # else the checkpoint holds model and moments twice
    store = Checkpoints(folder / "checkpoints")
    found: dict[str, Any] = {}
    gathering = timed(lambda: found.update(tensors=trainer._tensors(), plain={**trainer.plain_state(), "sinks": {}}))
    size = sum(t.numel() * t.element_size() for t in found["tensors"].values())
    step = tolaria.clock.step
    writing = timed(lambda: store.save(step, found["tensors"], found["plain"], None) if ranks.first else None)
    tell(stage="checkpoint", gather_seconds=gathering, write_seconds=writing, GB=size / 1e9)
    found.clear()
    if ranks.share(time.perf_counter() - began > 0.75 * limit):
        return tell(stage="resume", left_out="no time")
    before = [t.detach().clone() for t in tolaria.plane.host.module.parameters()]
    reading = timed(lambda: found.update(zip(("tensors", "plain"), store.load(ranks.share(step)), strict=True)))
    loading = timed(lambda: trainer._load(found["tensors"], found["plain"]))
    after = tolaria.plane.host.module.parameters()
    same = all(bool((a.to_local() == b.to_local()).all()) for a, b in zip(before, after, strict=True))
    return tell(stage="resume", read_seconds=reading, load_seconds=loading, same_weights=same)


# --- Scaling ---


def scaling(limit: float, quick: bool) -> None:
    """Seconds a step of a 124M GPT: Esper alone and on all GPUs, beside hand-written DDP and fully_shard loops."""
    began = time.perf_counter()
    width, length, batch, layers, vocabulary = (32, 16, 4, 2, 97) if quick else (768, 1024, 32, 12, 50304)
    steps, rounds = (2, 2) if quick else (20, 5)
    device = torch.device(own_device("auto"))
    group = join(str(device), "ddp")
    generator = torch.Generator().manual_seed(0)
    windows = (steps * (rounds + 2) + 8) * batch * group.size
    rows = [torch.randint(0, vocabulary, (n * length + 1,), generator=generator) for n in (windows, 2 * batch, batch)]
    task = task_of_parts("random", rows, vocabulary, length)
    registry = parts()
    contenders: dict[str, Callable[[], object]] = {}
    trainers: dict[str, Trainer] = {}
    of_esper: dict[str, tuple[str, Ranks]] = {
        "esper alone": ("auto", Ranks()), "esper ddp": ("ddp", group), "esper fsdp2": ("fsdp2", build(device, "fsdp2")),
    }  # fmt: skip
    for name, (strategy, ranks) in of_esper.items():
        config = RunConfig(
            host="gpt", task="stdlib", blueprints=("copy", "ffn"), controller="wait", epochs=1, strategy=strategy,
            batch_size=batch * ranks.size, learning_rate=3e-4, amp="off" if quick else "bf16", budget_params="",
            compile="off" if quick else "blocks", device=str(device) if ranks.size == 1 else "auto",
            decision_examples=2 * batch, settings={"gpt.width": width, "gpt.layers": layers},
        )  # fmt: skip
        setup = set_up(config, registry, task=task, ranks=ranks)
        spread(setup, ranks)
        trainers[name] = build_trainer(setup, {}, keeps=False)
        contenders[name] = partial(_step, trainers[name], trainers[name]._batches())
    for name in ("ddp by hand", "fsdp2 by hand"):
        model = GPT(vocabulary, layers, width, max(1, width // 64), length, 4.0, False).to(device)
        data = _rows(task, group, batch, str(device))
        contenders[name] = _by_hand(model, name, data, device, group, quick)
    weights = trainers["esper alone"].tolaria.plane.host_params
    tell(stage="ready", parameters=weights, seconds=time.perf_counter() - began, device=_name(), processes=group.size)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, step in contenders.items():
            took = timed(lambda step=step: [step() for _ in range(steps)]) / steps  # type: ignore[misc]
            if number:  # the first round compiles
                seconds[name].append(took)
        if group.share(time.perf_counter() - began > 0.8 * limit):
            break
    median = {name: statistics.median(values) for name, values in seconds.items() if values}
    flops = model_flops(weights, layers, width, length) * batch * length
    tell(
        stage="scaling", seconds_a_step=median, rounds=len(seconds["esper ddp"]), peak_GiB=memory(),
        mfu={name: flops / value / PEAK for name, value in median.items()},
        efficiency={n: median["esper alone"] / median[n] for n in ("esper ddp", "esper fsdp2")},
        over_by_hand={n: statistics.median(
            a / b for a, b in zip(seconds[f"esper {n}"], seconds[f"{n} by hand"], strict=True)
        ) for n in ("ddp", "fsdp2")},
    )  # fmt: skip
    for name in ("esper ddp", "esper fsdp2"):
        deciding = [timed(trainers[name].decide) for _ in range(3)]
        decision = statistics.median(deciding[1:])
        share = {f"each {n} steps": decision / (decision + n * median[name]) for n in (100, 200, 400)}
        tell(stage="decisions", of=name, seconds=deciding, share_of_time=share)


def _rows(task: Any, ranks: Ranks, batch: int, device: str) -> Iterator[Batch]:
    from esper_core.tolaria.timetable import rows_of_rank

    return rows_of_rank(task.train, ranks, batch * ranks.size, device=device, shuffle=True)


def _by_hand(
    model: GPT, name: str, data: Iterator[Batch], device: torch.device, ranks: Ranks, quick: bool
) -> Callable[[], object]:
    """One step of a loop as its users write it, on the same model."""
    if not quick:
        for block in model.blocks:
            block.compile()
    if name.startswith("ddp"):
        ids = [device.index] if device.type == "cuda" else None
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (ranks.size,))
        policy = MixedPrecisionPolicy() if quick else MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        wrapped = fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)

    def step() -> None:
        batch = next(data)
        with torch.autocast(device.type, torch.bfloat16, enabled=not quick):
            loss = token_loss(wrapped(batch.inputs), batch.targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("billion", "scaling"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=500.0, help="seconds after which no further piece begins")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    if "RANK" in os.environ:
        try:
            {"billion": billion, "scaling": scaling}[asked.what](asked.limit, asked.quick)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    threads = "1" if asked.quick else str(max(1, (os.cpu_count() or 2) // asked.processes - 1))
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(asked.processes),
              "OMP_NUM_THREADS": threads}  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(asked.processes)
    ]  # fmt: skip
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):  # one has failed, and the others wait for it
            time.sleep(5)
            for process in processes:
                process.kill()
        time.sleep(0.2)
    sys.exit(max(abs(process.returncode) for process in processes))


if __name__ == "__main__":
    main()
