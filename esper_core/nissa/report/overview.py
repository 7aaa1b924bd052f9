"""The results of a run as plain figures: what lists, summaries and the index page show."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs

from esper_core.leyline.stages import BORN, stages_where
from esper_core.nissa.report.control import control_of, verdict_of_record
from esper_core.nissa.report.reading import RunDigest, moment, read_json, training_seconds
from esper_core.nissa.report.wording import metric_of, number, printable

_VACANT = stages_where(occupied=False)
_KEPT = stages_where(permanent=True)


def summarise_run(folder: Path, digest: RunDigest | None = None) -> dict[str, Any]:
    """The results of a run, from its `run.json`, events and `compare.json`; None where unknown.

    Scores are of the test split once it was read, else the latest of the validation split: never the best of several.

    Args:
        digest: of the same folder, if it was read already.
    """
    digest = digest or RunDigest(folder, brief=True)
    manifest, compare = read_json(folder / "run.json"), read_json(folder / "compare.json")
    manifest = manifest if isinstance(manifest, Mapping) else {}
    config, control = manifest.get("config"), control_of(compare)
    ended: Mapping[str, Any] = digest.ended or {}
    last = digest.epochs[-1] if digest.epochs else [None] * 10
    host_params = number(digest.started.get("host_params"))
    seeds = number(last[7]) or 0.0
    params = number(ended.get("params")) or (host_params + seeds if host_params is not None else None)
    tested = number(ended.get("test_score")) is not None
    lives = {path: slot.segments[-1] for path, slot in digest.slots.items() if slot.segments}
    return {
        "name": folder.name, "folder": str(folder), "host": printable(digest.started.get("host", "unknown")),
        "task": printable(digest.started.get("task", "unknown")),
        "status": printable(ended.get("status", "unfinished")),
        "started": moment(manifest.get("started")), "ended": moment(manifest.get("ended")) if ended else None,
        "seconds": training_seconds(folder),
        "epochs": int(last[1] + 1) if last[1] is not None else 0, "steps": digest.last_step,
        "split": "test" if tested else "validation",
        "score": number(ended.get("test_score")) if tested else last[5],
        "metric": attrs.asdict(metric_of(digest.started)),
        "loss": number(ended.get("test_loss")) if tested else last[4],
        "control": control.to_mapping() if control is not None else None, "verdict": verdict_of_record(compare),
        "params": int(params) if params is not None else None, "host_params": host_params,
        "excess_params_ratio": params / host_params - 1 if params and host_params else None,
        "total_flops": number(ended.get("total_flops")) or last[9],
        "germinated": sum(mark[1] == BORN for mark in digest.marks),
        "fossilized": sum(life[2] in _KEPT for life in lives.values()),
        "undecided": [printable(path) for path, slot in digest.slots.items() if slot.undecided],
        "rollbacks": sum(mark[1] == "rolled_back" for mark in digest.marks),
        "slots": {printable(p): printable(f"{v[3]} {v[2]}").strip() for p, v in lives.items() if v[2] not in _VACANT},
        "token": _token(digest), "language": bool(_token(digest)),
        "config": config if isinstance(config, dict) else {},
    }  # fmt: skip


def age_of(summary: Mapping[str, Any], now: float) -> float | None:
    """Seconds since a run began; since its newest file was written where it does not say.

    Args:
        now: seconds since 1970.
    """
    if summary["started"]:
        return max(0.0, now - datetime.fromisoformat(summary["started"]).astimezone(UTC).timestamp())
    try:
        return max(0.0, now - max(file.lstat().st_mtime for file in Path(summary["folder"]).iterdir()))
    except (OSError, ValueError):
        return None


def _token(digest: RunDigest) -> str:
    """What the targets of a language task are; empty for other tasks. Runs of 0.1.0 do not say: by their points."""
    if "token" in digest.started:
        return printable(digest.started["token"])
    return "token" if any("causal" in str(slot.point.get("tags")) for slot in digest.slots.values()) else ""
