"""Seconds a step of a GPT in the shape of GPT-2 small that grows: one process, several, and loops written by hand.

Three phases: the host; the host after a deepening by copies; the same with a live seed besides. Loops by hand train the
model of the first two phases; that of `fully_shard` also keeps its parameters whole between forward and backward, as
`fsdp2` does where memory allows. A round times every contender in turn; every process has the same number of rows.
Launching is what a process does before the device is done: where it takes as long as the step, the device waits.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.several_gpus.shared import PEAK, device_name, memory, model_flops, on_gpu, parts, tell, timed, wait
from esper_core.kasmina.ranks import Ranks
from esper_core.leyline.host import Batch
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.process_group import ProcessGroup
from esper_core.tolaria.processes import build, join, own_device
from esper_core.tolaria.run import build_trainer
from esper_core.tolaria.setup import set_up, spread
from esper_core.tolaria.timetable import rows_of_rank
from esper_core.tolaria.trainer import Trainer
from esper_hosts.gpt import GPT
from esper_plugins.objectives.shared import token_loss
from esper_plugins.tasks.tokens import task_of_parts

STRATEGIES = ("ddp", "fsdp2")
KEPT = "fsdp2 kept whole"
DECISIONS = 3
"""Of each phase; the first meets a cold cache, and the second has a birth."""


def scaling(limit: float, quick: bool) -> None:
    """Train all contenders in turn, phase by phase."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # six contenders in one process, each of which compiles its own blocks
    began = time.perf_counter()
    width, length, batch, layers, vocabulary = (32, 16, 4, 2, 97) if quick else (768, 1024, 32, 12, 50304)
    steps, rounds, more = (2, 2, 1) if quick else (15, 2, 4)
    device = torch.device(own_device("auto"))
    group = join(str(device), "ddp")
    generator = torch.Generator().manual_seed(0)
    windows = (steps * (rounds + 1) * 3 + 16) * batch * group.size
    rows = [torch.randint(0, vocabulary, (n * length + 1,), generator=generator) for n in (windows, 8 * batch, batch)]
    task = task_of_parts("random", rows, vocabulary, length)
    trainers = _trainers(task, device, group, (width, layers, more, batch), quick)
    weights = trainers["alone"].tolaria.plane.host_params
    tell(stage="ready", parameters=weights, seconds=time.perf_counter() - began, device=device_name(),
         processes=group.size, rows_of_each=batch, length=length)  # fmt: skip
    contenders = {f"esper {name}": partial(_step, t, t._batches()) for name, t in trainers.items()}

    def by_hand(deep: int) -> dict[str, Callable[..., object]]:
        found = {}
        for name in (*STRATEGIES, KEPT):
            model = GPT(vocabulary, deep, width, max(1, width // 64), length, 4.0, False).to(device)
            data = rows_of_rank(task.train, group, batch * group.size, device=str(device), shuffle=True)
            found[f"{name} by hand"] = _by_hand(model, name, data, device, group, quick)
        return found

    def late(share: float) -> bool:
        return bool(group.share(time.perf_counter() - began > share * limit))

    for phase in ("host", "deepened", "with a live seed"):
        hand: dict[str, Callable[..., object]] = {}
        if phase != "with a live seed":
            hand = by_hand(layers if phase == "host" else layers + more)
        share = {"host": 0.6, "deepened": 0.8, "with a live seed": 0.9}[phase]
        seconds = _rounds(contenders | hand, steps, rounds, lambda share=share: late(share))  # type: ignore[misc]
        plane = trainers["alone"].tolaria.plane
        deep = layers + (more if phase != "host" else 0)
        flops = model_flops(weights - vocabulary * width + plane.ledger.seed_params, deep, width, length)
        _tell_phase(phase, seconds, flops * batch * length)
        if phase != "with a live seed":
            tell(stage="launching", phase=phase, seconds_a_step={
                name: _launching(step) for name, step in (contenders | hand).items()})  # fmt: skip
        if phase == "host":
            for name in ("esper fsdp2", "fsdp2 by hand"):
                _profile(name, (contenders | hand)[name])
        hand.clear()
        gc.collect()
        if late(0.9):
            return
        for name, trainer in trainers.items():
            median = statistics.median(seconds[f"esper {name}"])
            for number in range(DECISIONS):
                _tell_decision(trainer, phase, name, number, median)


def _tell_decision(trainer: Trainer, phase: str, name: str, number: int, step: float) -> None:
    """One decision: its seconds, and those of its parts on process 0; `step`: seconds of a training step."""
    tolaria, parts = trainer.tolaria, dict[str, float]()
    live = {path: str(growth.stage) for path, growth in tolaria.plane.growths.items() if growth.blueprint}
    for part in ("_measure", "keep", "view", "_ask", "obey", "_read_sensors"):
        setattr(tolaria, part, _timer(getattr(tolaria, part), part, parts))
    try:
        took = timed(trainer.decide)
    finally:
        for part in ("_measure", "keep", "view", "_ask", "obey", "_read_sensors"):
            delattr(tolaria, part)
    shares = {f"each {n} steps": took / (took + n * step) for n in (100, 200, 400)}
    tell(stage="decision", phase=phase, of=name, number=number, seconds=took, share_of_time=shares, before=live,
         parts=parts)  # fmt: skip


def _timer(function: Callable[..., Any], name: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def timed_(*args: Any, **more: Any) -> Any:
        wait()
        began = time.perf_counter()
        try:
            return function(*args, **more)
        finally:
            wait()
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began

    return timed_


def _trainers(
    task: Any, device: torch.device, group: ProcessGroup, size: tuple[int, int, int, int], quick: bool
) -> dict[str, Trainer]:
    """A run of Esper by this process alone, by all as `ddp`, and by all as `fsdp2`; each grows by the same plan."""
    width, layers, more, batch = size
    registry, found = parts(), {}
    steps = [
        {"op": "germinate", "slot": f"blocks.{layers - 1}", "blueprint": "copy", "tempo": "instant",
         "options": {"blocks": str(more)}, "decision": 1},
        {"op": "germinate", "slot": "blocks.0", "blueprint": "ffn", "decision": 3},
    ]  # fmt: skip
    groups: dict[str, Ranks] = {"alone": Ranks(), "ddp": group, "fsdp2": build(device, "fsdp2")}
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        plan.write_text(json.dumps({"advance": True, "steps": steps}))
        for name, ranks in groups.items():
            config = RunConfig(
                host="gpt", task="stdlib", blueprints=("copy", "ffn"), controller=f"schedule:{plan}", epochs=1,
                strategy="auto" if name == "alone" else name, batch_size=batch * ranks.size, learning_rate=3e-4,
                amp="off" if quick else "bf16", budget_params="", compile="off" if quick else "blocks",
                device=str(device) if name == "alone" else "auto", decision_examples=4 * batch,
                settings={"gpt.width": width, "gpt.layers": layers, "governor.settle": 20},
            )  # fmt: skip
            setup = set_up(config, registry, task=task, ranks=ranks)
            spread(setup, ranks)
            found[name] = build_trainer(setup, {}, keeps=False)
    return found


def _step(trainer: Trainer, batches: Iterator[Batch]) -> None:
    trainer.step(next(batches))
    trainer.position.batch += 1


def _rounds(
    contenders: Mapping[str, Callable[[], object]], steps: int, rounds: int, late: Callable[[], bool]
) -> dict[str, list[float]]:
    """Seconds a step of each contender in each round; the first round, which compiles, is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            step = contenders[name]
            took = timed(lambda step=step: [step() for _ in range(steps)]) / steps  # type: ignore[misc]
            if number:
                seconds[name].append(took)
            else:
                tell(stage="first round", of=name, seconds_a_step=took, peak_GiB=memory())
        if number and late():
            break
    return seconds


def _launching(step: Callable[[], object]) -> float:
    """Seconds until a step is launched on an idle device: a median of five, each of which the device then ends."""
    found = []
    for _ in range(5):
        wait()
        began = time.perf_counter()
        step()
        found.append(time.perf_counter() - began)
    wait()
    return statistics.median(found)


def _profile(name: str, step: Callable[[], object]) -> None:
    """Where three steps go: seconds on the GPU and on the CPU, and what took most of each, milliseconds a step."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]
    with profile(activities=kinds) as profiler:
        launched = time.perf_counter()
        for _ in range(3):
            step()
        launched = time.perf_counter() - launched
        wait()
    found = profiler.key_averages()
    on_device = {e.key[:60]: e.self_device_time_total / 3e3 for e in found if e.self_device_time_total}
    on_host = {e.key[:60]: e.self_cpu_time_total / 3e3 for e in found if e.self_cpu_time_total}

    def most(times: dict[str, float]) -> dict[str, float]:
        return {key: round(times[key], 3) for key in sorted(times, key=lambda k: -times[k])[:14]}

    tell(stage="profile", of=name, seconds_to_launch_a_step=launched / 3, kernels_ms=sum(on_device.values()),
         host_ms=sum(on_host.values()), on_device=most(on_device), on_host=most(on_host))  # fmt: skip


def _tell_phase(phase: str, seconds: Mapping[str, list[float]], flops: float) -> None:
    """Medians, scaling efficiency and ratios to the loops by hand; ratios are medians over rounds."""
    median = {name: statistics.median(values) for name, values in seconds.items()}

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    hand = [name for name in seconds if name.endswith("by hand")]
    over = {f"{n} over {b}": ratio(f"esper {n}", b) for n in STRATEGIES for b in hand if b.startswith(n)}
    tell(
        stage="scaling", phase=phase, rounds=len(seconds["esper ddp"]), seconds_a_step=median, all_seconds=seconds,
        efficiency={n: ratio("esper alone", n) for n in (*(f"esper {s}" for s in STRATEGIES), *hand)}, ratios=over,
        mfu={name: flops / value / PEAK for name, value in median.items()}, peak_GiB=memory(),
    )  # fmt: skip


def _by_hand(
    model: GPT, name: str, data: Iterator[Batch], device: torch.device, ranks: Ranks, quick: bool
) -> Callable[..., object]:
    """One step of a loop as its users write it, on the same model."""
    if not quick:
        for index, block in enumerate(model.blocks):
            model.blocks[index] = torch.compile(block)  # type: ignore[assignment]
    if name == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (ranks.size,))
        policy = MixedPrecisionPolicy() if quick else MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        wrapped = fully_shard(model, mesh=mesh, mp_policy=policy)
        if name == KEPT:
            wrapped.set_reshard_after_forward(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
    cast = name == "ddp" and not quick

    def step(mode: str = "default") -> None:
        with _algorithms(mode):
            batch = next(data)
            with torch.autocast(device.type, torch.bfloat16, enabled=cast):
                loss = token_loss(wrapped(batch.inputs), batch.targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

    return step


@contextmanager
def _algorithms(mode: str) -> Iterator[None]:
    """`default`: torch's own choice of algorithms; `warn`: deterministic ones, as every run of Esper asks for."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(mode)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
