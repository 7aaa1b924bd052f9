"""Several processes train what one trains, by the runs of `tests/distributed`; all of them at the same time.

One process, `ddp` and `fsdp2` for 220 steps in float64 with births, blends, a cull, a rollback and a deepening; a run
one of whose processes is killed, resumed with all processes and with one; and `esper run --devices N` itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.several_gpus.shared import ROOT, on_gpu, parts, tell
from tests.distributed import runs
from tests.distributed.test_agreement import STEPS
from tests.distributed.test_lost import CHANGES
from tests.distributed.test_lost import STEPS as LOST_STEPS

BAR = 1e-5
"""Largest difference of a step's loss that counts as agreement, nats."""


class Started:
    """Processes that one function runs in, with a limit on their time.

    Args:
        folder: for plans, answers and logs. name: of these files. count: how many. wanted: what `member` does.
    """

    def __init__(self, folder: Path, name: str, count: int, **wanted: Any) -> None:
        self.folder, self.name, self.count = folder, name, count
        (folder / f"{name}.wanted.json").write_text(json.dumps({"folder": str(folder), "name": name, **wanted}))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count),
                  "OMP_NUM_THREADS": "1"}  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.several_gpus.agreement", str(folder / f"{name}.wanted.json")]
        self.processes = [
            subprocess.Popen(
                command, cwd=ROOT, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL, stderr=(folder / f"{name}.{rank}.err").open("w"),
            )
            for rank in range(count)
        ]  # fmt: skip

    def ends(self, until: float) -> list[int | None]:
        """Exit codes once all have ended or the time is over; None for one that had to be killed."""
        while time.monotonic() < until and any(p.poll() is None for p in self.processes):
            time.sleep(0.1)
        codes = [p.poll() for p in self.processes]
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        return codes

    def answers(self) -> list[dict[str, Any] | None]:
        """What each process found; None where it left nothing."""
        files = [self.folder / f"{self.name}.{rank}.json" for rank in range(self.count)]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]

    def errors(self) -> list[str]:
        """The end of what each process wrote to stderr."""
        return [(self.folder / f"{self.name}.{rank}.err").read_text()[-1500:] for rank in range(self.count)]


def member(wanted: Mapping[str, Any]) -> None:
    """One process: train or resume, and leave losses and a digest."""
    runs.load_registry = parts  # type: ignore[attr-defined]  # runs without an installation
    if wanted.get("resume"):
        found = runs.resume(wanted["resume"])
    else:
        found = runs.train(wanted["folder"], wanted["name"], wanted["steps"], wanted["changes"])
    Path(wanted["folder"], f"{wanted['name']}.{os.environ['RANK']}.json").write_text(json.dumps(found))


def agreement(limit: float, quick: bool, processes: int) -> None:
    """Start all runs, and tell what each came to."""
    until = time.monotonic() + limit
    device = {"device": "cuda" if on_gpu() else "cpu", "amp": "off"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs.configure(temporary, "text", [])  # writes the text that all of them read
        strategies = ("ddp",) if quick else ("ddp", "fsdp2")
        one = Started(folder, "one", 1, steps=STEPS, changes=device)
        others = {
            name: Started(folder, name, processes, steps=STEPS, changes={**device, "strategy": name})
            for name in strategies
        }
        lost = Started(folder, "lost", processes, steps=LOST_STEPS, changes={**CHANGES, **device})
        typed = None if quick else _type_command(folder, processes)
        _lose(folder, lost, until, {**CHANGES, **device}, quick=quick)
        one.ends(until)
        alone = one.answers()[0]
        if alone is None:
            tell(stage="agreement", failed="one process", errors=one.errors())
        for name, started in others.items():
            codes = started.ends(until)
            _compare(folder, name, alone, started, codes)
        if typed is not None:
            try:
                code = typed.wait(max(1.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                typed.kill()
                code = None
            out = (folder / "typed.log").read_text()
            result = folder / "typed" / "result.json"
            tell(stage="esper run --devices", exit_code=code, end_of_output=out[-800:],
                 result=json.loads(result.read_text()) if result.exists() else None)  # fmt: skip


def _compare(
    folder: Path, name: str, alone: Mapping[str, Any] | None, started: Started, codes: list[int | None]
) -> None:
    answers = started.answers()
    if alone is None or any(answer is None or "losses" not in answer for answer in answers):
        tell(stage="agreement", strategy=name, failed=True, exit_codes=codes, errors=started.errors(), answers=answers)
        return
    found: list[Any] = list(answers)
    pairs = list(zip(alone["losses"], found[0]["losses"], strict=False))
    finite = [(a, b) for a, b in pairs if a == a or b == b]
    largest = max(abs(a - b) for a, b in finite)
    tell(stage="agreement", strategy=name, processes=len(found), steps=len(finite), largest_difference=largest,
         within_bar=largest < BAR, same_bits=len({answer["digest"] for answer in found}) == 1,
         same_events=_events(folder / name) == _events(folder / "one"), exit_codes=codes,
         status=[answer["status"] for answer in found])  # fmt: skip


def _events(run: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    kinds = ("stage_changed", "rolled_back", "governor_alarm", "command_refused", "fault_caught")
    return [(e["kind"], e["step"], e.get("slot"), e.get("after")) for e in lines if e["kind"] in kinds]


def _lose(folder: Path, lost: Started, until: float, changes: Mapping[str, Any], *, quick: bool) -> None:
    """Kill the last process after some checkpoints; then go on with all processes, and with one."""
    run = folder / "lost"
    while time.monotonic() < until and not list((run / "checkpoints").glob("*60.json")):
        if all(p.poll() is not None for p in lost.processes):
            break
        time.sleep(0.02)
    os.kill(lost.processes[-1].pid, signal.SIGKILL)
    killed = time.monotonic()
    codes = lost.ends(min(until, killed + 60))
    tell(stage="one process killed", seconds_until_the_others_ended=time.monotonic() - killed, exit_codes=codes,
         told=[(answer or {}).get("failed") for answer in lost.answers()], errors=lost.errors()[:1])  # fmt: skip
    if quick or not run.exists():
        return
    again = {}
    for count in (lost.count, 1):
        copied = shutil.copytree(run, folder / f"lost{count}" / "lost")
        again[count] = Started(folder, f"resumed-{count}", count, resume=str(copied))
    whole = Started(folder, "whole", lost.count, steps=LOST_STEPS, changes=changes)
    for count, started in again.items():
        codes = started.ends(until)
        tell(stage="resumed", processes=count, exit_codes=codes, answers=[
            {key: value for key, value in (answer or {}).items() if key != "losses"} for answer in started.answers()
        ], errors=[] if codes == [0] * count else started.errors())  # fmt: skip
    whole.ends(until)
    digests = {answer["digest"] for answer in (*again[lost.count].answers(), *whole.answers()) if answer}
    tell(stage="resumed", as_uninterrupted=len(digests) == 1, answers=len(whole.answers()))


def _type_command(folder: Path, processes: int) -> subprocess.Popen[bytes]:
    """`esper run --devices N`, as one types it, with all that this page is about."""
    strategy = ["--strategy", "fsdp2", "--recompute", "half", "--compile", "blocks" if on_gpu() else "off"]
    command = [
        sys.executable, "-m", "esper_core", "run", "--host", "gpt", "--task", f"text:{folder / 'text.txt'}",
        "--devices", str(processes), *strategy, "--blueprints", "copy,ffn", "--epochs", "2", "--steps-per-epoch", "60",
        "--batch-size", "16", "--device", "cuda" if on_gpu() else "cpu", "--out", str(folder / "typed"), "--quiet",
        "--set", "gpt.width=64", "--set", "text.length=64",
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, stdout=(folder / "typed.log").open("wb"), stderr=subprocess.STDOUT,
        env={key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    )  # fmt: skip


if __name__ == "__main__":
    member(json.loads(Path(sys.argv[1]).read_text()))
