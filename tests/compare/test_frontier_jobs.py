"""A list of jobs is run as it is, in place of a protocol's plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.growth.frontier import __main__ as command
from benchmarks.growth.frontier.protocols import STDLIB
from esper_core.trials.frontier.job import Job


@pytest.mark.parametrize("protocol", ["p9", "ablation"])
def test_jobs_of_a_file_are_run_under_the_protocols_base(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [
        Job(arm="by hand", budget=1e9, size={"layers": 1, "width": 16}, rate=0.01, grow=((0.2, 2),), slot="blocks.0"),
        Job(arm="static", budget=1e9, size={"layers": 2, "width": 16}, rate=0.01),
    ]
    file, rows, seen = tmp_path / "jobs.json", tmp_path / "rows.jsonl", {}
    file.write_text(json.dumps([job.to_mapping() for job in jobs]), encoding="utf-8")

    def queue(plan: Callable[[Any], list[Job]], base: Any, path: Path, **more: Any) -> bool:
        seen.update(jobs=plan([]), base=base, rows=path, workers=more["workers"])
        return True

    monkeypatch.setattr(command, "run_queue", queue)
    argv = ["frontier", protocol, "--jobs", str(file), "--rows", str(rows), "--cpu", "3"]
    monkeypatch.setattr("sys.argv", argv)
    command.main()
    assert seen == {"jobs": jobs, "base": STDLIB, "rows": rows, "workers": {"cpu": 3}}
    assert not rows.with_suffix(".json").exists()
