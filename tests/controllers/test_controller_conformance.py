"""The invariants of every controller that decides by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper_core.tamiyo.core import CoreConfig, TamiyoCore
from esper_core.testing import ControllerConformance


class TestHeuristic(ControllerConformance):
    spec = "heuristic"


class TestRandom(ControllerConformance):
    spec = "random"


class TestWait(ControllerConformance):
    spec = "wait"


class TestSchedule(ControllerConformance):
    spec = "schedule"

    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        file = tmp_path / "schedule.json"
        file.write_text('{"steps": [{"decision": 1, "op": "germinate", "slot": "1", "blueprint": "norm"}]}')
        self.argument = str(file)


class TestAgent(ControllerConformance):
    spec = "agent"

    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        core = TamiyoCore(CoreConfig(width=32, layers=1, heads=2), seed=0)
        core.save(tmp_path / "agent.safetensors")
        self.argument = str(tmp_path / "agent.safetensors")
