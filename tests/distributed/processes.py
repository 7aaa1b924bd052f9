"""Starts one function in several processes that meet as torchrun's would, and waits for all of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def start(count: int, arguments: list[str], **environment: str) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` in `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count),
              "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *arguments], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], timeout: float = 240) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return found


def call(count: int, function: str, *arguments: Any, **environment: str) -> list[Any]:
    """What `module:function(*arguments)` returns in each of `count` processes; JSON-compatible both ways."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        plan.write_text(json.dumps({"function": function, "arguments": arguments}))
        ended = finish(start(count, ["-m", "tests.distributed.processes", str(plan)], **environment))
        for code, out, err in ended:
            assert code == 0, f"exit code {code}\n{out}\n{err}"
        return [json.loads((Path(folder) / f"answer-{rank}.json").read_text()) for rank in range(count)]


def main(plan: str) -> None:
    """The other end of `call`."""
    import importlib

    asked = json.loads(Path(plan).read_text())
    module, _, name = asked["function"].partition(":")
    answer = getattr(importlib.import_module(module), name)(*asked["arguments"])
    Path(plan).with_name(f"answer-{os.environ['RANK']}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
