"""What one GPU makes of Esper: correctness, population throughput, overhead of the plane, waits, snapshots.

Run: python benchmarks/gpu.py [--out FILE] [--section NAME …]   (under eight minutes; `--quick` is a dry run on the CPU)
Every figure is a median of interleaved rounds of one run; the last thing printed is a short table.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / part) for part in ("", "hosts", "blueprints", "plugins")]  # runs without an installation

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.timing import machine, ratio  # noqa: E402
from esper_core.kasmina.compose import compose  # noqa: E402
from esper_core.kasmina.module_host import host_from_module  # noqa: E402
from esper_core.kasmina.plane import Plane  # noqa: E402
from esper_core.kasmina.scoring import training_loss  # noqa: E402
from esper_core.leyline.host import Batch  # noqa: E402
from esper_core.registry import Registry, load_registry  # noqa: E402
from esper_core.simic.cuda_engine import StackedPopulation  # noqa: E402
from esper_core.tolaria.config import RunConfig  # noqa: E402
from esper_core.tolaria.governor import GovernorConfig  # noqa: E402
from esper_core.tolaria.optimizer import GrowthOptimizer, OptimizerConfig  # noqa: E402
from esper_core.tolaria.snapshot import Snapshot  # noqa: E402
from esper_hosts.cnn import cnn  # noqa: E402

WIDTHS = "16,24,64"  # 0.28 GFLOP for one forward pass of 64 images of 3×32×32
RATE = 1e-3
SEEDS = ("depthwise", "conv", "bottleneck")


class Settings:
    """Sizes of a full run, or of a dry run on the CPU."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.device = "cpu" if quick else "cuda"
        self.counts = (1, 3) if quick else (1, 8, 64)
        self.batch, self.side = (4, 8) if quick else (64, 32)
        self.rounds = 2 if quick else 7
        self.registry = parts()

    def synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def parts() -> Registry:
    """The registry, with this repository's own plugins even where nothing is installed."""
    registry = load_registry()
    if not registry.specs("blueprint"):
        for name in ("esper_hosts.plugin", "esper_blueprints.plugin", "esper_plugins.blends.plugin"):
            registry.register(importlib.import_module(name), name=name)
    return registry


# --- Populations ---


def planes_for(s: Settings, count: int, *, seeds: bool = True) -> list[Plane]:
    """Environments with mixed seeds: a quarter has none, the others one of three blueprints, isolated or attached."""
    planes = []
    for k in range(count):
        host = cnn(outputs=10, input_shape=(3, s.side, s.side), seed=k, widths="4,6,8" if s.quick else WIDTHS)
        plane = Plane(host, s.registry, seed=k, ramp_steps=1)
        if seeds and k % 4 != 3:
            path = f"block{k % 3 + 1}"
            plane.germinate(path, SEEDS[(k // 3) % 3])
            plane.step()
            if k % 2:
                plane.advance(path, gated=False)
                plane.step()
        planes.append(plane)
    return planes


def images(s: Settings, count: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shape = (s.batch, 3, s.side, s.side)
    made = [(torch.randn(shape, generator=generator), torch.randint(0, 10, (s.batch,), generator=generator))
            for _ in range(count)]  # fmt: skip
    return [Batch(x.to(s.device), y.to(s.device)) for x, y in made]


class Loop:
    """The plain way: one environment after the other, perhaps each on a stream of its own."""

    def __init__(
        self,
        planes: Sequence[Plane],
        s: Settings,
        *,
        streams: bool = False,
        bf16: bool = False,
        epsilon: float = 1e-8,
        device: str = "",
    ) -> None:
        self.planes, self.device, self.bf16 = [copy.deepcopy(p) for p in planes], device or s.device, bf16
        self.optimizers, self.streams = [], []
        for plane in self.planes:
            plane.host.module.to(self.device).train()
            plane.module.to(self.device).train()
            optimizer = GrowthOptimizer(
                plane.host.module.parameters(), RunConfig(learning_rate=RATE), OptimizerConfig(seed_warmup=1)
            )
            optimizer.follow(plane)
            for group in optimizer.torch.param_groups:
                group["eps"] = epsilon
            self.optimizers.append(optimizer)
            self.streams.append(torch.cuda.Stream() if streams and s.device == "cuda" else None)

    def step(self, batch: Batch) -> None:
        for plane, optimizer, stream in zip(self.planes, self.optimizers, self.streams, strict=True):
            if stream is None:
                self._one(plane, optimizer, batch)
            else:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self._one(plane, optimizer, batch)
        for stream in self.streams:
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)

    def _one(self, plane: Plane, optimizer: GrowthOptimizer, batch: Batch) -> None:
        optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            logits = plane.host.forward_with_slots(batch.inputs)
        training_loss(logits, batch.targets).backward()
        optimizer.step(RATE)


def stacked(s: Settings, planes: Sequence[Plane], *, epsilon: float = 1e-8, **options: Any) -> StackedPopulation:
    from esper_core.simic.stacks import StackedAdamW

    optimizer = StackedAdamW(seed_warmup=1, epsilon=epsilon)
    return StackedPopulation(
        [copy.deepcopy(p) for p in planes], device=s.device, optimizer=optimizer, bucket=2, **options
    )


# --- 1. Correctness ---


def correctness(s: Settings) -> dict[str, Any]:
    """Slot invariants for every blueprint on the device, and the engine against separate runs."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        checks = {str(dtype).removeprefix("torch."): invariants(s, dtype) for dtype in (torch.float32, torch.bfloat16)}
        count = 3 if s.quick else 8
        agreement = {}
        planes = planes_for(s, count)
        # At Adam's usual epsilon a gradient that is nothing but rounding becomes a whole step, so two correct programs
        # part; the last row says how far one and the same loop parts from itself between the GPU and the CPU.
        for epsilon in (1e-3, 1e-8):
            loop = Loop(planes, s, epsilon=epsilon)
            rivals: dict[str, Any] = {
                f"stacked {c}": stacked(s, planes, epsilon=epsilon, convolution=c) for c in ("grouped", "patches")
            }
            cpu = Loop(planes, s, epsilon=epsilon, device="cpu")
            for batch in images(s, 20):
                loop.step(batch)
                for engine in rivals.values():
                    engine.step(batch, RATE)
                cpu.step(Batch(batch.inputs.cpu(), batch.targets.cpu()))
            for name, engine in rivals.items():
                found = max(gap(engine.pull(k), plane) for k, plane in enumerate(loop.planes))
                agreement[f"{name}, epsilon {epsilon:g}"] = found
            found = max(gap(a, b) for a, b in zip(cpu.planes, loop.planes, strict=True))
            agreement[f"the loop on the CPU, epsilon {epsilon:g}"] = found
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    return {"invariants": checks, f"largest weight difference, N={count}, 20 steps": agreement}


def gap(ours: Plane, theirs: Plane) -> float:
    """Largest difference of any weight or buffer of host and seeds."""
    pairs = zip(
        [*ours.host.module.state_dict().values(), *ours.module.state_dict().values()],
        [*theirs.host.module.state_dict().values(), *theirs.module.state_dict().values()],
        strict=True,
    )
    return max((a.double().cpu() - b.double().cpu()).abs().max().item() for a, b in pairs if a.numel())


def invariants(s: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """Each blueprint that serves maps: alpha 0 is the host, isolation leaves the host's gradients, the seed learns."""
    failures, tried = [], 0
    for registered in s.registry.specs("blueprint"):
        if "NCHW" not in registered.spec.layouts or registered.name == "noop":
            continue
        host = cnn(outputs=5, input_shape=(3, 16, 16), seed=0, widths="8,8,8", norm="group")
        host.module.to(s.device, dtype)
        plane = Plane(host, s.registry, ramp_steps=2)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(8, 3, 16, 16, generator=generator).to(s.device, dtype)
        y = torch.randint(0, 5, (8,), generator=generator).to(s.device)

        def run(plane: Plane = plane, x: Tensor = x, y: Tensor = y) -> tuple[Tensor, list[Tensor]]:
            plane.host.module.zero_grad()
            logits = plane.host.forward_with_slots(x)
            training_loss(logits, y).backward()
            return logits.detach().clone(), [p.grad.clone() for p in plane.host.module.parameters()]

        tried += 1
        bare, gradients = run()
        plane.germinate("block2", registered.name)
        isolated, after = run()
        taught = [p.grad for p in plane.seed_groups()["block2"]]
        rules = {
            "isolated output": torch.equal(bare, isolated),
            "isolated host gradients": all(map(torch.equal, gradients, after)),
            "seed has a gradient at birth": any(g is not None and bool(g.abs().sum() > 0) for g in taught),
        }
        plane.step()
        plane.advance("block2", gated=False)
        rules["alpha 0"] = torch.equal(bare, run()[0])
        plane.step()
        plane.step()
        rules["alpha 1 reaches upstream"] = any(bool(g.abs().sum() > 0) for g in run()[1][:1])
        failures += [f"{registered.name}: {rule}" for rule, held in rules.items() if not held]
    return {"blueprints": tried, "failures": failures}


# --- 2. Throughput ---


def throughput(s: Settings) -> dict[str, Any]:
    """Environment steps a second for N hosts with mixed seeds, engine against loop and streams."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    out: dict[str, Any] = {"ceiling (TFLOP/s)": ceilings(s)}
    batch = images(s, 1)[0]
    for count in s.counts:
        planes = planes_for(s, count)
        flops = forward_flops(planes[0]) * s.batch
        contenders: dict[str, tuple[Callable[[], object], int]] = {}
        loop, streams = Loop(planes, s), Loop(planes, s, streams=True)
        low = Loop(planes, s, bf16=True)
        slow = max(1, 128 // count)
        contenders["loop, tf32"] = (lambda loop=loop: loop.step(batch), slow)
        contenders["streams, tf32"] = (lambda streams=streams: streams.step(batch), slow)
        contenders["loop, bf16"] = (lambda low=low: low.step(batch), slow)
        for convolution in ("grouped", "patches"):
            for precision, name in ((torch.float32, "tf32"), (torch.bfloat16, "bf16")):
                engine = stacked(s, planes, convolution=convolution, precision=precision)
                try:
                    engine.step(batch, RATE)
                except RuntimeError as error:
                    out[f"N={count}, stacked {convolution}, {name}"] = {"error": str(error).splitlines()[0]}
                    continue
                contenders[f"stacked {convolution}, {name}"] = (lambda e=engine: e.step(batch, RATE), 40)
        seconds = clock(s, contenders)
        base = {name: statistics.median(values) for name, values in seconds.items()}
        rows = {}
        for name, values in seconds.items():
            rate = count / statistics.median(values)
            kernels, calls = launches(s, contenders[name][0])
            rows[name] = {
                "env-steps/s": rate,
                "ms a population step": base[name] * 1e3,
                "times the stream loop": 1 / ratio(seconds, name, "streams, tf32"),
                "times the loop of its precision": 1 / ratio(seconds, name, f"loop, {name.rpartition(' ')[2]}"),
                "kernels an env-step": kernels / count,
                "launch calls an env-step": calls / count,
                "TFLOP/s": 3 * flops * rate / 1e12,
            }
        out[f"N={count}"] = {"GFLOP of one forward pass of a batch": flops / 1e9, "rows": rows}
        del contenders, loop, streams, low
        free(s)
    return out


def forward_flops(plane: Plane) -> float:
    """FLOPs of one example's forward pass, seeds left out."""
    from esper_core.kasmina.flops import count_flops

    host = copy.deepcopy(plane).host
    x = torch.zeros(1, 3, 32, 32)
    host.module.eval()
    with torch.no_grad():
        return float(count_flops(lambda: host.module(x)))


def ceilings(s: Settings) -> dict[str, float]:
    """What a large matrix product reaches here."""
    size, out = (256, {}) if s.quick else (8192, {})
    for name, dtype in (("tf32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=s.device, dtype=dtype) for _ in range(2))
        seconds = clock(s, {"product": (lambda a=a, b=b: a @ b, 10)})["product"]
        out[name] = 2 * size**3 / statistics.median(seconds) / 1e12
    return out


def clock(
    s: Settings, contenders: dict[str, tuple[Callable[[], object], int]], rounds: int = 0
) -> dict[str, list[float]]:
    """Seconds of one call of each contender in each round; a timing begins and ends with an idle device."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-2, rounds or s.rounds):
        for name, (run, repeats) in contenders.items():
            s.synchronise()
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            s.synchronise()
            if number >= 0:
                seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def launches(s: Settings, run: Callable[[], object], steps: int = 3) -> tuple[float, float]:
    """Kernels that ran, and calls that launched them, of one call of `run`."""
    if s.device != "cuda":
        return 0.0, 0.0
    from torch.profiler import ProfilerActivity, profile

    run()
    s.synchronise()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            run()
        s.synchronise()
    kernels = calls = 0
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset")):
            kernels += not getattr(event, "is_user_annotation", False)
        calls += event.name in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cudaGraphLaunch",
                                "cuLaunchKernelEx")  # fmt: skip
    return kernels / steps, calls / steps


# --- 3. The plane's overhead ---


def resnet50(s: Settings) -> tuple[nn.Module, Any]:
    import timm

    name, batch, side = ("resnet18", 2, 64) if s.quick else ("resnet50", 128, 224)
    dtype = torch.float32 if s.quick else torch.bfloat16
    model = timm.create_model(name, num_classes=1000).to(s.device, dtype, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, side, side, device=s.device, dtype=dtype)
    return model, x.to(memory_format=torch.channels_last)


def gpt(s: Settings) -> tuple[nn.Module, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 128}
    config = GPT2Config(**(small if s.quick else {}), use_cache=False, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model = GPT2LMHeadModel(config).to(s.device, torch.float32 if s.quick else torch.bfloat16)
    length = 64 if s.quick else 1024
    return model, torch.randint(0, config.vocab_size, (2 if s.quick else 8, length), device=s.device)


def pass_through(forward: Callable[[Any], Any], x: Any) -> Callable[[], None]:
    """Forward and backward of a model that answers with logits, or with something that holds them."""

    def run() -> None:
        out = forward(x)
        logits = out if isinstance(out, Tensor) else out.logits
        logits.float().square().mean().backward()

    return run


def overhead(s: Settings) -> dict[str, Any]:
    """Dormant slots against the bare model; three live seeds against the same composed by hand; compile."""
    out: dict[str, Any] = {}
    for name, build, blueprint in (("resnet50", resnet50, "depthwise"), ("gpt2-124M", gpt, "lora")):
        torch.manual_seed(0)
        model, x = build(s)
        model.train()
        bare = copy.deepcopy(model)
        host = host_from_module(model, example=x[:1])
        plane = Plane(host, s.registry, ramp_steps=1)
        dormant = pass_through(host.forward_with_slots, x)
        seconds = clock(s, {"bare": (pass_through(bare, x), 3), "dormant": (dormant, 3)}, rounds=s.rounds * 2)
        figures = {"slots": len(plane.slots), "bare (ms)": statistics.median(seconds["bare"]) * 1e3,
                   "dormant": ratio(seconds, "dormant", "bare")}  # fmt: skip
        del bare, dormant
        free(s)
        paths = list(plane.slots)
        for path in (paths[1], paths[len(paths) // 2], paths[-1]):
            plane.germinate(path, blueprint)
            plane.step()
            plane.advance(path, gated=False)
            plane.step()
        by_hand = compose(plane).train()
        seconds = clock(s, {"by hand": (pass_through(by_hand, x), 3),
                            "live": (pass_through(host.forward_with_slots, x), 3)}, rounds=s.rounds * 2)  # fmt: skip
        figures["three live seeds"] = ratio(seconds, "live", "by hand")
        out[name] = figures
        del by_hand, plane, host, model
        free(s)
    out["compile"] = recompiles(s)
    return out


def recompiles(s: Settings) -> dict[str, Any]:
    """Compiled graphs of a host while a seed's alpha rises: as many after the sweep as after its first step."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    host = cnn(outputs=10, input_shape=(3, 16, 16), seed=0, widths="8,16,16")
    host.module.to(s.device).train()
    plane = Plane(host, s.registry, ramp_steps=30)
    plane.germinate("block2", "conv")
    plane.step()
    plane.advance("block2", gated=False)
    compiled = torch.compile(host.module, backend="eager" if s.quick else "inductor")
    x = torch.randn(8, 3, 16, 16, device=s.device)
    graphs = []
    for _ in range(40):
        compiled(x).square().mean().backward()
        plane.step()
        graphs.append(counters["stats"]["unique_graphs"])
    return {"graphs after the first step": graphs[0], "graphs after the sweep": graphs[29],
            "graphs after the ramp's end": graphs[-1],
            "graph breaks": sum(counters["graph_break"].values())}  # fmt: skip


# --- 4. Waits ---


def waits(s: Settings) -> dict[str, Any]:
    """The per-batch path under `set_sync_debug_mode("error")`: a wait for the device raises."""
    from esper_core.nissa.sensors import SensorArray

    planes, made = planes_for(s, 3 if s.quick else 8), images(s, 12)
    engine, loop = stacked(s, planes), Loop(planes[:1], s)
    sensors = SensorArray(loop.planes[0])
    sensors.attach()
    out: dict[str, Any] = {}

    def run_of_one(batch: Batch) -> None:
        plane, optimizer = loop.planes[0], loop.optimizers[0]
        optimizer.zero_grad()
        training_loss(plane.host.forward_with_slots(batch.inputs), batch.targets).backward()
        sensors.after_backward()
        optimizer.step(RATE)
        sensors.after_step()
        plane.step()

    for name, run in (("population", lambda b: engine.step(b, RATE)), ("run of one, with sensors", run_of_one)):
        run(made[0])
        s.synchronise()
        if s.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in made:
                run(batch)
            out[name] = "no wait in 12 batches"
        except RuntimeError as error:
            out[name] = str(error).splitlines()[0]
        finally:
            if s.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return out


# --- 5. Snapshots ---


def snapshots(s: Settings) -> dict[str, Any]:
    """The governor's snapshot of a 124M GPT beside a training step of it."""
    torch.manual_seed(0)
    model, x = gpt(s)
    host = host_from_module(model, example=x[:1])
    plane = Plane(host, s.registry)
    optimizer = GrowthOptimizer(model.parameters(), RunConfig(learning_rate=1e-4), OptimizerConfig())
    optimizer.follow(plane)
    targets = x.roll(-1, 1)

    def step() -> None:
        optimizer.zero_grad()
        training_loss(host.forward_with_slots(x), targets).backward()
        optimizer.step(1e-4)

    snapshot = Snapshot()
    step()
    snapshot.take(plane, optimizer, 1)
    seconds = clock(s, {"step": (step, 5), "snapshot": (lambda: snapshot.take(plane, optimizer, 1), 5)})
    cost = ratio(seconds, "snapshot", "step")
    every = GovernorConfig().snapshot_every
    return {"step (ms)": statistics.median(seconds["step"]) * 1e3,
            "snapshot (ms)": statistics.median(seconds["snapshot"]) * 1e3,
            "snapshot over step": cost, f"overhead at one in {every} steps": cost / every,
            "steps between snapshots for 1%": cost * 100}  # fmt: skip


def free(s: Settings) -> None:
    """Give memory back between contenders."""
    import gc

    gc.collect()
    if s.device == "cuda":
        torch.cuda.empty_cache()


SECTIONS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "correctness": correctness, "throughput": throughput, "waits": waits, "overhead": overhead,
    "snapshots": snapshots,
}  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The few lines that answer the questions."""
    lines = []
    for name, value in result.items():
        if name == "throughput" and "error" not in value:
            for count, group in value.items():
                if "rows" in group:
                    for row, figures in group["rows"].items():
                        lines.append(
                            f"{count:5s} {row:22s} {figures['env-steps/s']:10.0f} env-steps/s"
                            f" {figures['times the stream loop']:7.1f}x streams"
                            f" {figures['kernels an env-step']:7.1f} kernels"
                            f" {figures['launch calls an env-step']:7.2f} launches {figures['TFLOP/s']:7.2f} TFLOP/s"
                        )
                else:
                    lines.append(f"{count} {json.dumps(group)}")
        else:
            lines.append(f"{name}: {json.dumps(value)}")
    return "\n".join(lines)


def main() -> None:
    """Measure the sections asked for; write after each, so that a run cut short leaves what it had."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny sizes on the CPU, to see that it runs")
    parser.add_argument("--section", action="append", choices=list(SECTIONS), default=[])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if not arguments.quick and not torch.cuda.is_available():
        parser.exit(2, "no GPU here; --quick is a dry run on the CPU\n")
    settings = Settings(arguments.quick)
    result: dict[str, Any] = {"machine": machine()}
    if settings.device == "cuda":
        result["machine"] |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for name in arguments.section or SECTIONS:
        start = time.perf_counter()
        try:
            result[name] = SECTIONS[name](settings)
        except Exception as error:  # noqa: BLE001 - one section must not cost the others on a lent machine
            result[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]}
        free(settings)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
