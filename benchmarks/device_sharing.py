"""Processes that use one GPU at once: CUDA's multi-process service, where its daemon can be started."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Final

_TRY: Final = """
import torch
for number in range(torch.cuda.device_count()):
    ones = torch.ones(64, 64, device=f"cuda:{number}")
    print(float((ones @ ones).sum()))
"""


def share_devices(log: Callable[[str], object]) -> dict[str, str]:
    """Start the daemon for all GPUs of this machine, and try it on each.

    Args:
        log: is told whether it worked, and why not.

    Returns:
        What processes need in their environment to share the GPUs; empty where they take turns.
    """
    folder = tempfile.mkdtemp(prefix="mps-")
    wanted = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
    try:
        _run(["nvidia-cuda-mps-control", "-d"], wanted, 10.0)
        _run([sys.executable, "-c", _TRY], wanted, 60.0)
    except (OSError, subprocess.SubprocessError) as error:
        log(f"processes take turns on the device: {error}")
        return {}
    log("processes share the device")
    return wanted


def stop_sharing(shared: Mapping[str, str]) -> None:
    """End the daemon of `share_devices`, given its answer."""
    if shared:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            _run(["nvidia-cuda-mps-control"], shared, 5.0, b"quit\n")


def _run(command: list[str], more: Mapping[str, str], seconds: float, text: bytes | None = None) -> None:
    subprocess.run(
        command, env={**os.environ, **more}, check=True, timeout=seconds, capture_output=True, input=text
    )  # fmt: skip
