"""Runs one check over very many names: a forked process each, limits on time and memory, results as JSON lines.

A sweep goes on where it stopped: names that have a result are skipped. With `--deadline` it stops in time. Names that
sound large come last, and one that the machine has no memory for at the moment gets no result: the next sweep tries it.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs

Check = Callable[[str], dict[str, Any]]
BIG = re.compile(r"giga|giant|enormous|huge|_7b|so400m|xlarge|xxlarge|_2b|_1b|large|g_14|h_14")
PLACE = re.compile(r"/[^ '\"]*/site-packages/")
"""Where a machine keeps its packages; a result says nothing of it."""

FEW = 60
"""Names that are written out where they have no result; of more, only the number is told."""

STARVED = "the machine's memory ran out"


@attrs.define
class Child:
    """A running check."""

    name: str
    pid: int
    pipe: int
    started: float
    peak: int = 0
    text: bytes = b""


def arguments(description: str, out: str, table: str) -> argparse.ArgumentParser:
    """The options that every sweep takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("names", nargs="*", help="names or patterns; all if none is given")
    parser.add_argument(
        "--out", default=out, help="JSON lines, one a name; names in it are skipped (default %(default)s)"
    )
    parser.add_argument("--table", default=table, help="Markdown page to write at the end (default %(default)s)")
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0))), help="default: every core")
    parser.add_argument("--shard", default="0/1", help="only every n-th name from the i-th: i/n")
    parser.add_argument("--sample", type=int, default=0, help="only so many names, evenly spread")
    parser.add_argument(
        "--timeout", type=float, default=240, help="processor seconds for one name (default %(default)s)"
    )
    parser.add_argument("--memory", type=float, default=24, help="GB for one name (default %(default)s)")
    parser.add_argument("--deadline", type=float, default=0, help="stop after so many seconds; 0: never")
    parser.add_argument("--retry", action="store_true", help="check names again that failed")
    return parser


def sweep(names: Sequence[str], check: Check, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Check every chosen name that has no result yet; returns the results of all names, old ones included.

    Args:
        names: what to check.
        check: called in a process of its own; answers with JSON-compatible data, or raises.
        options: see `arguments`.
    """
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    results = read_results(out)
    chosen = choose(names, options)
    waiting = [name for name in chosen if name not in results or (options.retry and not results[name]["ok"])]
    waiting.sort(key=lambda name: not BIG.search(name))  # popped from the end: big ones last
    done, total, begun = len(chosen) - len(waiting), len(chosen), time.monotonic()
    starved: list[str] = []
    running: dict[int, Child] = {}
    gc.collect()
    gc.freeze()  # what is there now stays out of every child's collections, which would copy the pages it lies on
    with out.open("a") as file:
        if out.stat().st_size and not out.read_text().endswith("\n"):
            file.write("\n")  # a torn line stays alone
        try:
            while waiting or running:
                late = options.deadline and time.monotonic() - begun > options.deadline
                if late:
                    break
                while waiting and len(running) < options.workers and (not running or free_memory() > 4e9):
                    child = start(waiting.pop(), check)
                    running[child.pid] = child
                for child in list(running.values()):
                    result = poll(child, options)
                    if result is None:
                        continue
                    del running[child.pid]
                    if result.get("starved"):
                        starved.append(child.name)
                        continue
                    results[child.name] = result
                    file.write(json.dumps({"name": child.name, **result}) + "\n")
                    file.flush()
                    done += 1
                    progress(done, total, results, begun)
                time.sleep(0.005)
        finally:
            for child in running.values():
                os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
    print(file=sys.stderr)
    if starved:
        print(f"the machine had no memory left for {', '.join(sorted(starved))}: run the sweep again", file=sys.stderr)
    if waiting:
        print(f"stopped at the deadline with {len(waiting) + len(running)} names left", file=sys.stderr)
    return {name: results[name] for name in names if name in results}


def choose(names: Sequence[str], options: argparse.Namespace) -> list[str]:
    """The names that patterns, shard and sample leave."""
    patterns = options.names or ["*"]
    chosen = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    index, count = map(int, options.shard.split("/"))
    chosen = chosen[index::count]
    if options.sample and options.sample < len(chosen):
        chosen = [chosen[i * len(chosen) // options.sample] for i in range(options.sample)]
    return chosen


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Results by name, the last one of each; a torn last line is ignored."""
    results: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        results[row.pop("name")] = row
    return results


def start(name: str, check: Check) -> Child:
    """Fork a process that checks `name` and writes its result into a pipe."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        os.set_blocking(read, False)
        return Child(name, pid, read, time.monotonic())
    os.close(read)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    try:
        result = {"ok": True, **check(name)}
    except BaseException as error:  # noqa: BLE001 - every error of the child is its result
        where = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(f.filename).name}:{f.lineno}" for f in where[-3:]]
        stage = getattr(error, "stage", "")
        told = PLACE.sub("…/", f"{type(error).__name__}: {error}")[:600]
        result = {"ok": False, "stage": stage, "error": told, "where": own}
    with os.fdopen(write, "w") as pipe:
        json.dump(result, pipe)
    os._exit(0)


def poll(child: Child, options: argparse.Namespace) -> dict[str, Any] | None:
    """The child's result if it has one by now; a child beyond its limits is killed, and that is its result.

    A child is timed by its own processor, since others may share the machine; one that waits for ever is killed too.
    """
    try:
        while chunk := os.read(child.pipe, 65536):
            child.text += chunk
        ended = True
    except BlockingIOError:
        ended = False
    seconds, worked = time.monotonic() - child.started, processor_seconds(child.pid)
    child.peak = max(child.peak, resident(child.pid))
    reason = ""
    if not ended:
        if max(worked, seconds / 20) > options.timeout:
            reason = f"took more than {options.timeout:.0f} s"
        elif child.peak > options.memory * 1e9:
            reason = f"needs more than {options.memory:g} GB"
        elif free_memory() < 1e9:
            reason = STARVED
        if not reason:
            return None
        os.kill(child.pid, signal.SIGKILL)
    os.close(child.pipe)
    _, status, usage = os.wait4(child.pid, 0)
    try:
        result = json.loads(child.text) if not reason else {"ok": False, "stage": "limits", "error": reason}
    except json.JSONDecodeError:
        result = {"ok": False, "stage": "limits", "error": f"the process died (status {status})"}
    cpu = usage.ru_utime + usage.ru_stime
    if reason == STARVED:
        return {"ok": False, "starved": True}
    return {**result, "seconds": round(seconds, 1), "cpu": round(cpu, 1), "gigabytes": round(child.peak / 1e9, 2)}


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def processor_seconds(pid: int) -> float:
    """Seconds for which a process has computed."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_memory() -> float:
    """Bytes that new processes can have."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return float(line.split()[1]) * 1024
    return float("inf")


def progress(done: int, total: int, results: dict[str, dict[str, Any]], begun: float) -> None:
    """One line on stderr."""
    failed = sum(not result["ok"] for result in results.values())
    bar = "█" * (30 * done // max(1, total))
    seconds = time.monotonic() - begun
    print(f"\r{bar:<30} {done}/{total}, {failed} failed, {seconds:.0f} s ", end="", file=sys.stderr, flush=True)


def markdown(
    title: str, command: str, results: dict[str, dict[str, Any]], notes: Iterable[str], names: Sequence[str]
) -> str:
    """The page: the share that works, how many points, what was not checked, and a table of what fails and why."""
    good = {name: result for name, result in results.items() if result["ok"]}
    bad = {name: result for name, result in results.items() if not result["ok"]}
    share = 100 * len(good) / max(1, len(results))
    lines = [f"# {title}", "", *notes, "", f"Command: `{command}`", ""]
    summary = f"**{len(good)} of {len(results)} work: {share:.1f} %.**"
    built = len(results) - sum(result["stage"] == "build" for result in bad.values())
    if built < len(results):
        summary += f" Of the {built} that could be built it is {100 * len(good) / max(1, built):.1f} %."
    lines += [summary, ""]
    missing = [name for name in names if name not in results]
    if missing:
        which = f": {', '.join(missing)}" if len(missing) <= FEW else ""
        lines += [f"Not checked yet: {len(missing)} of {len(names)}{which}.", ""]
    if good:
        counts = sorted(result["points"] for result in good.values())
        layouts = Counter(layout for result in good.values() for layout in result["layouts"])
        roles = Counter(role for result in good.values() for role in result["roles"])
        lines += [
            f"Points a model: {counts[0]} to {counts[-1]}, median {counts[len(counts) // 2]}. "
            f"Models with points of layout {', '.join(f'{k}: {v}' for k, v in sorted(layouts.items()))}; "
            f"of role {', '.join(f'{k}: {v}' for k, v in roles.most_common())}.",
            "",
        ]
    if bad:
        lines += ["| what | stage | why |", "|---|---|---|"]
        for name, result in sorted(bad.items()):
            why = " ".join(str(result["error"]).replace("|", "\\|").split())
            lines.append(f"| {name} | {result['stage']} | {why[:240]} |")
    return "\n".join(lines).rstrip() + "\n"
