"""Training on a lent GPU in calls of a few minutes: smoke, training, contests; resumable between calls.

    python -m benchmarks.device_training --out FOLDER [--limit 550] [--arms taught] [--resume TAR | --base AGENT]

It ends by itself within `--limit` seconds whatever happens, and keeps `FOLDER/simic.tar` up to date all the time:

- `log.txt`: what happened when. `smoke.json`: every pair of host and task of the curriculum by itself on the device.
- `ARM/`: the training of each arm, as `esper tamiyo resume` continues it; `imitated.safetensors`: its core before PPO;
  `after-N.safetensors`: its core after so many iterations.
- `contests-SEED.jsonl`: contests, three of four on held-out worlds, one a line; `contests-SEED.json`: their summary.

Arms are trainings that differ in one setting and share workers and device. A second call takes the tar of the first.
`--device cpu --curriculum FILE` is a dry run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing.connection
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

_BEGAN = time.monotonic()  # loading what follows takes its share of the call

import attrs  # noqa: E402
import torch  # noqa: E402

from benchmarks.device_sharing import share_devices, stop_sharing  # noqa: E402
from esper_core.simic.gym.cpu_engine import WorkerPool  # noqa: E402
from esper_core.simic.learning.curriculum import Curriculum, World, curriculum_text, parse_curriculum  # noqa: E402
from esper_core.simic.learning.evaluation import summarise_contests  # noqa: E402
from esper_core.simic.learning.rollout import GroupPlayed, PackedCore, Played, contest, rollout, told  # noqa: E402
from esper_core.simic.learning.training import Record, Training, new_manifest  # noqa: E402
from esper_core.tamiyo.core import TamiyoCore  # noqa: E402
from esper_core.tamiyo.learned import load_agent  # noqa: E402
from esper_core.tolaria.config import RunConfig  # noqa: E402

ARMS: Final[Mapping[str, tuple[str, str]]] = {
    "taught": ("", ""),
    "proposed": ("[imitation]\niterations = 2", "[imitation]\niterations = 0"),
}
"""What each arm replaces in the curriculum's text."""
_SMOKE_S: Final = 80.0
_EVAL_S: Final = 100.0
_END_S: Final = 20.0
"""Seconds for the smoke pieces, for contests unless told otherwise, and kept for the end."""
_LONG_S: Final = 70.0
"""Seconds that the longest contests take."""
_KEPT_EVERY: Final = 4
"""Iterations between cores that are kept."""
_LOST: Final = 3
"""Exit code of an arm that can use the device no more."""


class _Called:
    """One call: its folder, clock and log."""

    def __init__(self, work: Path, out: Path, limit: float) -> None:
        self.work, self.out, self.began, self.limit = work, out, _BEGAN, limit
        self.base: Path | None = None
        self.seed, self.at_once, self.drawn, self.retold = 1, 4, True, False
        self.held_out_alone = False
        self.shared: dict[str, str] = {}
        self.started: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()

    @property
    def left(self) -> float:
        return self.limit - (time.monotonic() - self.began)

    def log(self, *words: object) -> None:
        line = f"{time.monotonic() - self.began:7.1f} " + " ".join(map(str, words))
        print(line, flush=True)
        with open(self.work / "log.txt", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def write(self, name: str, content: Any) -> None:
        (self.work / name).write_text(json.dumps(content, indent=1), encoding="utf-8")

    def stop(self) -> None:
        """End what was started and goes on."""
        for process in self.started:
            if process.poll() is None:
                self.log("an arm is stopped")
                os.killpg(process.pid, signal.SIGKILL)

    def pack(self) -> None:
        """Write the tar, with the newest checkpoint of each arm alone."""
        with self._lock:
            temporary = self.out / ".simic.tar.part"
            with tarfile.open(temporary, "w:gz", compresslevel=1) as tar:
                for path in sorted(self.work.rglob("*")):
                    if path.is_file() and not path.name.startswith(".") and self._wanted(path):
                        try:
                            tar.add(path, str(path.relative_to(self.work)), recursive=False)
                        except FileNotFoundError:  # a checkpoint that was replaced meanwhile
                            continue
            os.replace(temporary, self.out / "simic.tar")

    @staticmethod
    def _wanted(path: Path) -> bool:
        if path.parent.name != "checkpoints":
            return True
        newest = max((p.stem for p in path.parent.iterdir() if not p.name.startswith(".")), default="")
        return path.stem == newest


# --- Smoke: every host and task of the curriculum by itself ---


def pieces(curriculum: Curriculum) -> list[tuple[World, str]]:
    """Worlds narrowed to one host and one task, at the shortest length; two of them at the longest."""
    found: list[tuple[World, str]] = []
    for world in curriculum.chosen(held_out=False):
        for number, (host, task) in enumerate(itertools.product(world.hosts or ({},), world.tasks or ({},))):
            lengths = sorted({min(world.horizons, default=1), *(world.horizons[-1:] if number in (1, 7) else ())})
            for length in lengths:
                only = {"hosts": (host,) if host else (), "tasks": (task,) if task else (), "horizons": (length,)}
                name = f"{world.name} {host.get('host', '')} {task.get('task', '')} ×{length}"
                found.append((attrs.evolve(world, **only), name))
    return found


def smoke_piece(
    state: dict[str, Any], world: World, packed: PackedCore, rewards: Sequence[str], groups: int, size: int, device: str
) -> dict[str, Any]:
    """Play some groups of one world on the device; what it took, or the error in full."""
    began = time.monotonic()
    runs = []
    for g in range(groups):
        run = world.draw(random.Random(g), g, random.Random(0))
        runs.append(attrs.evolve(run, rewards=tuple(rewards)))
    told_: dict[str, Any] = {"host": runs[0].host, "task": runs[0].task, "settings": dict(runs[0].settings)}
    numbers = list(range(groups))
    try:
        told(state, rollout, packed, runs, size, numbers, numbers, device)
        first = time.monotonic() - began
        began = time.monotonic()
        answers, spent, notes = told(state, rollout, packed, runs, size, numbers, numbers, device)
    except Exception as error:  # noqa: BLE001 - the others go on
        return {**told_, "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:]}
    steps = sum(len(e) * r.steps_per_epoch * r.epochs for r, (e, _) in zip(runs, answers, strict=True))
    seconds = time.monotonic() - began
    return {**told_, "first_s": first, "again_s": seconds, "steps_per_s": steps / seconds, "episodes": sum(
        len(e) for e, _ in answers), "spent": spent, "notes": notes}  # fmt: skip


def smoke(call: _Called, curriculum: Curriculum, device: str, seconds: float) -> None:
    """Every piece in a process of its own, all at once; one that fails or hangs costs only itself."""
    wanted, results = pieces(curriculum), dict[str, Any]()
    packed = PackedCore.pack(TamiyoCore(curriculum.core, seed=0))
    pool, end = WorkerPool(len(wanted)), time.monotonic() + seconds
    try:
        for worker, (world, _) in enumerate(wanted):
            pool.send(worker, smoke_piece, world, packed, list(curriculum.rewards), 2, curriculum.group_size, device)
        open_ = dict(enumerate(name for _, name in wanted))
        while open_ and time.monotonic() < end:
            pipes = {pool._pipes[w]: w for w in open_}
            for pipe in multiprocessing.connection.wait(list(pipes), timeout=1.0):
                worker = pipes[pipe]  # type: ignore[index]
                name = open_.pop(worker)
                try:
                    results[name] = pool.receive(worker)
                except Exception as error:  # noqa: BLE001 - the others go on
                    results[name] = {"error": f"{type(error).__name__}: {str(error)[-2000:]}"}
                call.log("smoke", name, json.dumps({k: results[name][k] for k in ("error", "first_s", "again_s",
                         "steps_per_s") if k in results[name]}))  # fmt: skip
                call.write("smoke.json", results)
        for name in open_.values():
            results[name] = {"error": f"not done in {seconds:.0f} s"}
            call.log("smoke", name, "not done")
        call.write("smoke.json", results)
    finally:
        for process in pool._processes:
            process.kill()


# --- Training ---


def guarded(
    state: dict[str, Any], play: Callable[..., list[GroupPlayed]], *arguments: Any
) -> tuple[list[GroupPlayed], dict[str, float], list[str]]:
    """As `told`; a stack that fails is left out of the iteration, and its error told."""
    try:
        return told(state, play, *arguments)
    except Exception as error:  # noqa: BLE001 - the iteration goes on with the other stacks
        runs = next(a for a in arguments if isinstance(a, list) and a and isinstance(a[0], RunConfig))
        run = runs[0]
        about = f"{run.host} {run.task} {dict(run.settings)} {run.blueprints} ×{run.steps_per_epoch}"
        text = f"FAILED {about}: {type(error).__name__}: {error}\n{traceback.format_exc()[-2500:]}"
        return [([], []) for _ in runs], {}, [text]


class GuardedTraining(Training):
    """A training that goes on where single stacks fail."""

    _work = staticmethod(guarded)


class _TimeIsUp(Exception):
    """The next iteration would not end in time."""


class _DeviceLost(Exception):
    """A process can use the device no more."""


def arm(folder: Path, workers: int, seconds: float) -> None:
    """Train in `folder` for so many seconds at most; runs in a process of its own."""
    end, slowest = time.monotonic() + seconds, 0.0
    began = time.monotonic()
    training = GuardedTraining.resume(folder)
    keep = training.demonstrations

    def notify(record: Record) -> None:
        nonlocal began, slowest
        took, began = time.monotonic() - began, time.monotonic()
        slowest = max(0.7 * slowest, took)
        failed = sorted(n for n in training.notices if n.startswith("FAILED"))
        training.notices -= set(failed)
        worlds = {name: round(value, 4) for name, value in record["worlds"].items()}
        print(f"{folder.name} {record['iteration']} {record['phase']} return {record['return']:+.4f} {worlds} "
              f"weight {record['params_ratio']:.2f} steps {record['environment_steps']} took {took:.1f} s "
              f"{ {k: round(v, 1) for k, v in record['seconds'].items()} } "
              f"{ {k: round(v, 4) for k, v in record['update'].items()} } {record['commands']} failed {len(failed)}",
              flush=True)  # fmt: skip
        for text in failed[:2]:
            print(text, flush=True)
        if training.done == keep and training.product.exists():
            (folder / "imitated.safetensors").write_bytes(training.product.read_bytes())
        elif training.done % _KEPT_EVERY == 0 and training.product.exists():
            (folder / f"after-{training.done}.safetensors").write_bytes(training.product.read_bytes())
        if any("CUDA error" in text for text in failed):
            raise _DeviceLost
        if time.monotonic() + 1.2 * slowest > end:
            raise _TimeIsUp

    while training.done < training.iterations and time.monotonic() + 1.2 * slowest < end:
        try:
            training.run(workers, notify)
        except _TimeIsUp:
            break
        except _DeviceLost:
            sys.exit(_LOST)
        except Exception as error:  # noqa: BLE001 - told, then tried again with other draws
            print(f"{folder.name} {traceback.format_exc()[-3000:]}", flush=True)
            if "CUDA error" in str(error):
                sys.exit(_LOST)
            about = json.loads((folder / "training.json").read_text(encoding="utf-8"))
            about["seed"] += 1000
            (folder / "training.json").write_text(json.dumps(about), encoding="utf-8")
            time.sleep(1.0)
            training = GuardedTraining.resume(folder)
    print(f"{folder.name} ends at {training.done} of {training.iterations}", flush=True)


def train(call: _Called, arms: Sequence[str], text: str, name: str, device: str, workers: int, seconds: float) -> None:
    """All arms side by side, each with its share of the workers."""
    end = time.monotonic() + seconds
    for one in arms:
        folder = call.work / one
        if not (folder / "training.json").exists():
            manifest = new_manifest(name, seed=call.seed, backend="stacked", device=device, worlds_at_once=call.at_once)
            text_ = text.replace(*ARMS[one]) if ARMS[one][0] else text
            Training.start(folder, attrs.evolve(manifest, text=text_), call.base)
        elif call.retold:
            about = json.loads((folder / "training.json").read_text(encoding="utf-8"))
            call.log(one, "goes on under another curriculum" if about["text"] != text else "keeps its curriculum")
            call.write(f"{one}/training.json", {**about, "text": text, "worlds_at_once": call.at_once})
    environment = {**os.environ, **call.shared}
    processes = {one: _start(call, one, workers // len(arms), end, environment) for one in arms}
    packed = time.monotonic()
    while any(p.poll() is None for p in processes.values()) and time.monotonic() < end + 15.0:
        time.sleep(1.0)
        for one, process in processes.items():
            if process.poll() == _LOST and time.monotonic() < end - 60.0:
                call.log(one, "lost the device and begins again from its checkpoint")
                alone = {name: value for name, value in environment.items() if not name.startswith("CUDA_MPS")}
                processes[one] = _start(call, one, workers // len(arms), end, alone)
        if time.monotonic() - packed > 60.0:
            call.pack()
            packed = time.monotonic()
    call.stop()
    call.pack()


def _start(call: _Called, one: str, workers: int, end: float, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """An arm in a process of its own, whose lines go to the log."""
    command = [sys.executable, "-m", "benchmarks.device_training", "--arm", str(call.work / one),
               "--workers", str(max(1, workers)), "--seconds", f"{end - time.monotonic():.0f}"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
                               start_new_session=True)  # fmt: skip

    call.started.append(process)

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            call.log(line.rstrip())

    threading.Thread(target=listen, daemon=True).start()
    return process


def share_device(call: _Called) -> None:
    """Let kernels of several processes run at once, where the driver's daemon for it can be started."""
    call.shared = share_devices(call.log)


# --- Contests ---


def contenders(call: _Called, arms: Sequence[str]) -> dict[str, PackedCore]:
    """The first shipped core, each arm's newest as it would be used and drawn from, and one after imitation."""
    found = {"core_v1": PackedCore.pack(load_agent("core_v1"))}
    for one in arms:
        for file, name in (("agent", one), ("imitated", f"{one}-imitated")):
            path = call.work / one / f"{file}.safetensors"
            if path.exists() and (file == "agent" or (one == arms[0] and not call.held_out_alone)):
                packed = PackedCore.pack(TamiyoCore.load(path))
                found[name] = packed
                if file == "agent" and call.drawn:
                    found[f"{name}-drawn"] = attrs.evolve(packed, sample=True)
    return found


def judge(call: _Called, curriculum: Curriculum, arms: Sequence[str], workers: int, seed: int, seconds: float) -> None:
    """Contests on held-out worlds until time is up, three of four, and on worlds of the training."""
    cores, end = contenders(call, arms), time.monotonic() + seconds
    here = [w for w in curriculum.worlds if not w.held_out or _can_lay(w)]
    plan = attrs.evolve(curriculum, worlds=here)
    pool = WorkerPool(workers)
    path, done = call.work / f"contests-{seed}.jsonl", list[dict[str, Any]]()
    controllers = list(curriculum.controllers)
    busy: dict[int, tuple[World, RunConfig, bool]] = {}
    numbers = itertools.count()

    def hand_out(worker: int) -> None:
        number = next(numbers)
        held_out = call.held_out_alone or number % 4 != 3
        world, run = plan.draw(seed, 0, number * curriculum.alike, held_out=held_out)  # one a structure
        busy[worker] = (world, run, held_out)
        pool.send(worker, contest, world, run, controllers, cores)

    try:
        for worker in range(len(pool)):
            hand_out(worker)
        while busy and time.monotonic() < end:
            pipes = {pool._pipes[w]: w for w in busy}
            for pipe in multiprocessing.connection.wait(list(pipes), timeout=1.0):
                worker = pipes[pipe]  # type: ignore[index]
                world, run, held_out = busy.pop(worker)
                try:
                    answer: dict[str, Played] = pool.receive(worker)
                except Exception as error:  # noqa: BLE001 - the others go on
                    call.log("contest", world.name, f"{type(error).__name__}: {str(error)[-800:]}")
                    answer = {}
                if answer:
                    row = {"world": world.name, "held_out": held_out, "seed": run.seed, "host": run.host,
                           "task": run.task, "steps": run.steps_per_epoch * run.epochs, "rent": run.rent,
                           "settings": dict(run.settings), "budget_params": run.budget_params,
                           "blueprints": list(run.blueprints),
                           "played": {name: attrs.asdict(one) for name, one in answer.items()}}  # fmt: skip
                    done.append(row)
                    with open(path, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                if time.monotonic() < end - min(_LONG_S, seconds / 3):  # so that long ones are not those that are lost
                    hand_out(worker)
        call.log(f"{len(done)} contests, {len(busy)} not ended")
    finally:
        for process in pool._processes:
            process.kill()
    if done:
        summary = {name: summarise_contests(rows) for name, rows in (
            ("held out", [r for r in done if r["held_out"]]), ("trained", [r for r in done if not r["held_out"]]),
            *((w, [r for r in done if r["world"] == w]) for w in sorted({r["world"] for r in done})),
        ) if rows}  # fmt: skip
        call.write(f"contests-{seed}.json", {"seed": seed, "summary": summary})
        for name, table in summary.items():
            for who, about in table.items():
                call.log(name, who, f"n={about['contests']} return {about['return']:+.4f}", "minus wait",
                         about["minus"].get("wait"), "minus heuristic", about["minus"].get("heuristic"))  # fmt: skip


def _can_lay(world: World) -> bool:
    """Whether the data of a held-out world is on this machine."""
    from esper_core.simic.learning.rollout import _ground

    try:
        _ground({}, world.draw(random.Random(0), 0))
    except Exception:  # noqa: BLE001 - it is left out
        return False
    return True


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit", type=float, default=550.0)
    parser.add_argument("--arms", default="taught")
    parser.add_argument("--resume", type=Path, help="the tar of an earlier call")
    parser.add_argument("--base", type=Path, help="an agent to go on from, without imitation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--worlds-at-once", type=int, default=4, help="groups in one stack")
    parser.add_argument("--curriculum", default="differing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--contest-seed", type=int, default=7101)
    parser.add_argument("--contest-seconds", type=float, default=_EVAL_S, help="for contests, after training")
    parser.add_argument("--likeliest", action="store_true", help="no contender whose commands are drawn")
    parser.add_argument("--no-smoke", action="store_true")
    parser.add_argument("--held-out-alone", action="store_true", help="no contests on worlds of the training")
    parser.add_argument("--retold", action="store_true", help="go on under the curriculum as it is now")
    parser.add_argument("--no-train", action="store_true", help="contests alone")
    parser.add_argument("--arm", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    told_ = parser.parse_args()
    if told_.arm:
        arm(told_.arm, told_.workers, told_.seconds)
        return
    if told_.out is None:
        parser.error("--out FOLDER is missing")
    told_.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="device-training-"))
    call, arms = _Called(work, told_.out, told_.limit), told_.arms.split(",")

    call.base, call.seed, call.at_once = told_.base, told_.seed, told_.worlds_at_once

    def end_anyway() -> None:
        time.sleep(max(1.0, call.left - _END_S / 2))
        call.log("time is up")
        call.stop()
        call.pack()
        os._exit(0)

    threading.Thread(target=end_anyway, daemon=True).start()
    if told_.resume:
        with tarfile.open(told_.resume) as tar:
            tar.extractall(work, filter="data")
        call.log(f"continues {told_.resume}")
    workers = told_.workers or len(os.sched_getaffinity(0))
    try:
        about = f"torch {torch.__version__}, {workers} workers"
        call.log(about, torch.cuda.get_device_name() if told_.device == "cuda" else "no GPU")
        text = curriculum_text(told_.curriculum)
        curriculum = parse_curriculum(text, told_.curriculum)
        fresh = not told_.resume and not told_.no_smoke
        sharing = threading.Thread(target=share_device, args=(call,), daemon=True)
        if told_.device == "cuda":
            sharing.start()
        if fresh:
            smoke(call, curriculum, told_.device, min(_SMOKE_S, told_.limit / 6))
            call.pack()
        if told_.device == "cuda":
            sharing.join(timeout=60.0)
        call.drawn, call.retold = not told_.likeliest, told_.retold
        call.held_out_alone = told_.held_out_alone
        judging = min(told_.contest_seconds, told_.limit - 2 * _END_S)
        if not told_.no_train:
            seconds = call.left - judging - 2 * _END_S
            train(call, arms, text, told_.curriculum, told_.device, workers, seconds)
        stop_sharing(call.shared)
        judge(call, curriculum, arms, workers, told_.contest_seed, call.left - 1.5 * _END_S)
    except Exception:  # noqa: BLE001 - what there is goes back
        call.log(traceback.format_exc())
    call.log("ends")
    call.pack()
    os._exit(0)


if __name__ == "__main__":
    main()
