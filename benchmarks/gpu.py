"""What one GPU makes of Esper: correctness, population throughput, waits, overhead, compiling, snapshots, a grown run.

Run: python benchmarks/gpu.py [--out FILE] [--section NAME …]   (under eight minutes; `--quick` is a dry run on the CPU)
Every timing is a median of interleaved rounds of one run; the last thing printed is a short table.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT / part) for part in ("", "hosts", "blueprints", "plugins")]  # runs without an installation
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # matrix products compute the same each time

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.gpu_grown import grown_run  # noqa: E402
from benchmarks.gpu_populations import (  # noqa: E402
    RATE,
    RATES,
    Loop,
    Settings,
    gap,
    images,
    planes_for,
    smooth,
    stacked,
)
from benchmarks.timing import machine, ratio  # noqa: E402
from esper_core.kasmina.compose import compose  # noqa: E402
from esper_core.kasmina.module_host import host_from_module  # noqa: E402
from esper_core.kasmina.plane import Plane  # noqa: E402
from esper_core.leyline.actions import Command  # noqa: E402
from esper_core.leyline.host import Batch  # noqa: E402
from esper_core.leyline.stages import Op  # noqa: E402
from esper_core.tolaria.config import RunConfig  # noqa: E402
from esper_core.tolaria.governor import GovernorConfig  # noqa: E402
from esper_core.tolaria.optimizer import GrowthOptimizer, OptimizerConfig  # noqa: E402
from esper_core.tolaria.snapshot import Snapshot  # noqa: E402
from esper_hosts.cnn import cnn  # noqa: E402
from esper_plugins.objectives.shared import token_loss  # noqa: E402

# --- 1. Correctness ---


def correctness(s: Settings) -> dict[str, Any]:
    """Slot invariants for every blueprint on the device, and the engine against separate runs."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    count = 3 if s.quick else 8
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        checks = {str(dtype).removeprefix("torch."): invariants(s, dtype) for dtype in (torch.float32, torch.bfloat16)}
        hosts = {"ReLU and max pooling": planes_for(s, count), "GELU and average pooling": planes_for(s, count)}
        for plane in hosts["GELU and average pooling"]:
            smooth(plane.host.module)
        agreement = {
            f"{rule}, hosts with {name}": agree(s, planes, rule) for rule in RATES for name, planes in hosts.items()
        }
    wavering = {str(w.message).partition(" does not have")[0] for w in said if "deterministic impl" in str(w.message)}
    return {"invariants": checks, f"largest weight difference, N={count}, 20 steps": agreement,
            "largest loss difference, engine in bf16 and float32, 20 steps": half_precision(s),
            "without a deterministic implementation": sorted(wavering)}  # fmt: skip


def half_precision(s: Settings) -> dict[str, float]:
    """How far the losses are apart, for a population that grows every blueprint for maps, one an environment."""
    fitting = [r.name for r in s.registry.specs("blueprint") if "NCHW" in r.spec.layouts and r.name != "noop"]
    planes = planes_for(s, len(fitting), seeds=False)
    engines = [stacked(s, planes, precision=precision) for precision in (torch.float32, torch.bfloat16)]
    for engine in engines:
        for k, blueprint in enumerate(fitting):
            engine.apply(k, Command(Op.GERMINATE, "block2", blueprint))
        engine.step(images(s, 1, seed=1)[0], RATE)
        engine.synchronise()
        for plane in engine.planes[::2]:
            plane.advance("block2", gated=False)
        engine.synchronise()
    for batch in images(s, 20):
        for engine in engines:
            engine.step(batch, RATE)
    apart = (engines[0].losses[1:21] - engines[1].losses[1:21]).abs().amax(0)
    return dict(zip(fitting, apart.tolist(), strict=True))


def agree(s: Settings, planes: Sequence[Plane], rule: str) -> dict[str, float]:
    """How far the programs are apart after 20 steps: engine and loop in float32 and float64."""
    wide = [copy.deepcopy(plane) for plane in planes]
    for plane in wide:
        plane.host.module.double()
        plane.module.double()
    loops = {"float32": Loop(planes, s, rule=rule), "float64": Loop(wide, s, rule=rule)}
    again = Loop(planes, s, rule=rule)
    engines = {
        ("grouped", "float32"): stacked(s, planes, rule=rule),
        ("grouped again", "float32"): stacked(s, planes, rule=rule),
        ("patches", "float32"): stacked(s, planes, rule=rule, convolution="patches"),
        ("grouped", "float64"): stacked(s, wide, rule=rule),
    }
    for batch in images(s, 20):
        double = Batch(batch.inputs.double(), batch.targets)
        for dtype, loop in loops.items():
            loop.step(batch if dtype == "float32" else double)
        for (_, dtype), engine in engines.items():
            engine.step(batch if dtype == "float32" else double, RATES[rule])
        again.step(batch)
    pulled = {name: [engine.pull(k) for k in range(len(planes))] for name, engine in engines.items()}
    pairs = {
        "engine and loop, float32": (pulled["grouped", "float32"], loops["float32"].planes),
        "engine as patches and loop, float32": (pulled["patches", "float32"], loops["float32"].planes),
        "engine and loop, float64": (pulled["grouped", "float64"], loops["float64"].planes),
        "the loop in float32 and in float64": (loops["float32"].planes, loops["float64"].planes),
        "the loop and itself": (again.planes, loops["float32"].planes),
        "the engine and itself": (pulled["grouped again", "float32"], pulled["grouped", "float32"]),
    }
    return {name: max(map(gap, *pair)) for name, pair in pairs.items()}


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
            token_loss(logits, y).backward()
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
    ceiling = ceilings(s)
    out: dict[str, Any] = {"ceiling (TFLOP/s)": ceiling}
    batch = images(s, 1)[0]
    programs: dict[tuple[int, str], Callable[[], object]] = {}
    for count in s.counts:
        planes = planes_for(s, count)
        flops = forward_flops(planes[0]) * s.batch
        contenders: dict[str, tuple[Callable[[], object], int]] = {}
        for streams, name in ((False, "loop"), (True, "streams")):
            for bf16, precision in ((False, "tf32"), (True, "bf16")):
                loop = Loop(planes, s, streams=streams, bf16=bf16)
                contenders[f"{name}, {precision}"] = (lambda loop=loop: loop.step(batch), max(1, 64 // count))
        for convolution in ("grouped", "patches"):
            for dtype, precision in ((torch.float32, "tf32"), (torch.bfloat16, "bf16")):
                engine = stacked(s, planes, convolution=convolution, precision=dtype)
                contenders[f"stacked {convolution}, {precision}"] = (lambda e=engine: e.step(batch, RATE), 20)
        seconds = clock(s, contenders)
        rows = {}
        for name, values in seconds.items():
            rate, precision = count / statistics.median(values), name.rpartition(" ")[2]
            rows[name] = {
                "env-steps/s": rate,
                "ms a population step": statistics.median(values) * 1e3,
                "times the stream loop": 1 / ratio(seconds, name, "streams, tf32"),
                "times the stream loop of its precision": 1 / ratio(seconds, name, f"streams, {precision}"),
                "times the loop of its precision": 1 / ratio(seconds, name, f"loop, {precision}"),
                "TFLOP/s": 3 * flops * rate / 1e12,
                "share of the ceiling": 3 * flops * rate / 1e12 / ceiling[precision],
            }
            programs[count, name] = contenders[name][0]
        out[f"N={count}"] = {"GFLOP of one forward pass of a batch": flops / 1e9, "rows": rows}
    for (count, name), run in programs.items():  # after all timings: launches stay slow once they have been traced
        kernels, calls = launches(s, run)
        out[f"N={count}"]["rows"][name] |= {
            "kernels an env-step": kernels / count, "launch calls an env-step": calls / count
        }  # fmt: skip
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
    order = list(contenders.items())
    for number in range(-2, rounds or s.rounds):
        first = number % len(order)
        for name, (run, repeats) in (*order[first:], *order[:first]):
            s.synchronise()
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            s.synchronise()
            if number >= 0:
                seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def launches(s: Settings, run: Callable[[], object]) -> tuple[int, int]:
    """Kernels that ran, and calls that launched them, of one call of `run`."""
    if s.device != "cuda":
        return 0, 0
    from torch.profiler import ProfilerActivity, profile

    run()
    s.synchronise()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        s.synchronise()
    kernels = calls = 0
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset")):
            kernels += not getattr(event, "is_user_annotation", False)
        calls += event.name in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cudaGraphLaunch",
                                "cuLaunchKernelEx")  # fmt: skip
    return kernels, calls


# --- 3. The plane's overhead ---


def resnet50(s: Settings) -> tuple[nn.Module, Any]:
    import timm

    name, batch, side = ("resnet18", 2, 64) if s.quick else ("resnet50", 128, 224)
    dtype = torch.float32 if s.quick else torch.bfloat16
    model = timm.create_model(name, num_classes=1000).to(s.device, dtype, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, side, side, device=s.device, dtype=dtype)
    return model, x.to(memory_format=torch.channels_last)


def gpt(s: Settings, batch: int = 8) -> tuple[nn.Module, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 128}
    config = GPT2Config(**(small if s.quick else {}), use_cache=False, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model = GPT2LMHeadModel(config).to(s.device, torch.float32 if s.quick else torch.bfloat16)
    length = 64 if s.quick else 1024
    return model, torch.randint(0, config.vocab_size, (2 if s.quick else batch, length), device=s.device)


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
    for name, build, blueprint in (
        ("resnet50", resnet50, "depthwise"),
        ("gpt2-124M, batch 8", gpt, "lora"),  # a step so short that the processor which launches it is the limit
        ("gpt2-124M, batch 32", partial(gpt, batch=32), "lora"),
    ):
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
    return out


def compiling(s: Settings) -> dict[str, Any]:
    """Compiled graphs of a model with three seeds whose alphas rise: no more after the sweep than before."""
    from torch._dynamo.utils import counters

    out: dict[str, Any] = {}
    for name, build, blueprint in (("resnet50", resnet50, "depthwise"), ("gpt2-124M", gpt, "lora")):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model, x = build(s)
        host = host_from_module(model.train(), example=x[:1])
        plane = Plane(host, s.registry, ramp_steps=20)
        paths = list(plane.slots)
        paths = [paths[1], paths[len(paths) // 2], paths[-1]]
        for path in paths:
            plane.germinate(path, blueprint)
        plane.step()
        for path in paths:
            plane.advance(path, gated=False)
        run = pass_through(torch.compile(host.module, backend="eager" if s.quick else "inductor"), x)
        start, graphs, alphas = time.perf_counter(), [], []
        for _ in range(18):
            plane.step()
            run()
            graphs.append(counters["stats"]["unique_graphs"])
            alphas.append(plane.growths[paths[0]].alpha)
        s.synchronise()
        out[name] = {"alphas": [alphas[0], alphas[-1]], "graphs after the first step": graphs[0],
                     "graphs after the sweep": graphs[-1], "graph breaks": sum(counters["graph_break"].values()),
                     "seconds, compilation included": time.perf_counter() - start}  # fmt: skip
        del run, plane, host, model
        torch._dynamo.reset()
        free(s)
    return out


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
        token_loss(plane.host.forward_with_slots(batch.inputs), batch.targets).backward()
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
        token_loss(host.forward_with_slots(x), targets).backward()
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


def grown(s: Settings) -> dict[str, Any]:
    """A whole run on 60,000 images of CIFAR-10's shape, and what it leaves behind."""
    return grown_run(s.registry, device=s.device, quick=s.quick)


def usual_arithmetic() -> None:
    """Put back what a section has set: tf32, whichever kernels are fastest, deterministic or not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.set_deterministic_debug_mode("default")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True


SECTIONS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "correctness": correctness, "waits": waits, "overhead": overhead, "snapshots": snapshots, "compiling": compiling,
    "grown": grown, "throughput": throughput,  # the last traces launches, which makes later ones slow
}  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The few lines that answer the questions."""
    lines = []
    for name, section in result.items():
        for title, value in section.items():
            if "rows" not in (value if isinstance(value, dict) else {}):
                lines.append(f"{name}, {title}: {short(value)}")
                continue
            for row, figures in value["rows"].items():
                lines.append(
                    f"{title:5s} {row:22s} {figures['env-steps/s']:8.0f} env-steps/s"
                    f" {figures['times the stream loop']:6.1f}x streams"
                    f" {figures['kernels an env-step']:6.1f} kernels"
                    f" {figures['launch calls an env-step']:6.2f} launches {figures['TFLOP/s']:6.2f} TFLOP/s"
                    f" {figures['share of the ceiling']:6.2%}"
                )
    return "\n".join(lines)


def short(value: Any) -> str:
    """Numbers with four digits, and what holds them."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {short(held)}" for key, held in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
    for package in ("timm", "torchvision", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            result["machine"][package] = metadata.version(package)
    if settings.device == "cuda":
        result["machine"] |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for name in arguments.section or SECTIONS:
        start = time.perf_counter()
        usual_arithmetic()
        try:
            result[name] = SECTIONS[name](settings)
        except Exception as error:  # noqa: BLE001 - one section must not cost the others on a lent machine
            result[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]}
        free(settings)
        result.setdefault("seconds", {})[name] = time.perf_counter() - start
        print(f"{name}: {result['seconds'][name]:.1f} s", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
