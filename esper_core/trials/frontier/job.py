"""One training run at a budget of FLOPs: a static network, or one that grows."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from esper_core.leyline.scaling import NEED, POWER
from esper_core.storage.tensor_file import parse_json
from esper_core.tamiyo.depth_plan import RATIO, SLACK
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import eval_run, start_run


@attrs.frozen(kw_only=True)
class Job:
    """A run and its purpose.

    Attributes:
        arm: its name in tables. stage: what it is for, such as `tune` or `final`.
        seed: of weights and data. budget: FLOPs.
        size: options of the host that set its size at the start, such as `{"layers": 2, "width": 64}`.
        rate: peak learning rate. decay: share of the budget in which the rate falls to zero.
        grow: (share of the budget, factor) of every growth; empty for a static network. slot: behind its last block.
        heuristic: the heuristic decides about growth, and `grow` is ignored.
        order: `stack` or `interleave`. birth, moments: options of the blueprint `copy`. tempo: of the blend.
        config: further fields of the run's configuration, over those of the protocol.
        settings: further settings. test: whether the test text is read.
    """

    arm: str
    stage: str = "final"
    seed: int = 0
    budget: float
    size: Mapping[str, int]
    rate: float
    decay: float = 0.4
    grow: tuple[tuple[float, int], ...] = ()
    slot: str = ""
    heuristic: bool = False
    order: str = "stack"
    birth: str = "copy"
    moments: bool = True
    tempo: str = "instant"
    config: Mapping[str, Any] = attrs.field(factory=dict)
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    test: bool = False

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Job:
        """The job of a row or of a list of jobs."""
        known = {field.name for field in attrs.fields(cls)}
        given = {key: value for key, value in values.items() if key in known}
        return cls(**{**given, "grow": tuple(tuple(step) for step in given.get("grow", ()))})

    def to_mapping(self) -> dict[str, Any]:
        """JSON-compatible data."""
        return {**attrs.asdict(self), "grow": [list(step) for step in self.grow]}

    @property
    def key(self) -> str:
        """What identifies the run: everything that changes its result, but not its name or purpose."""
        told = {k: v for k, v in self.to_mapping().items() if k not in ("arm", "stage")}
        if self.heuristic:
            told["law"] = [NEED, POWER, SLACK, RATIO]  # its decisions depend on these
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def is_static(self) -> bool:
        """Whether the network keeps its size."""
        return not self.grow and not self.heuristic


def config_of(job: Job, base: Mapping[str, Any], folder: Path) -> RunConfig:
    """The run's configuration.

    Args:
        base: fields of the protocol. folder: where run and schedule go.
    """
    settings = {
        **base.get("settings", {}), **job.settings,
    }  # fmt: skip
    settings |= {f"{host_name(base)}.{name}": value for name, value in job.size.items()}
    controller = str(base.get("controller", "heuristic")) if job.heuristic else "wait"
    settings = {key: value for key, value in settings.items() if key.partition(".")[0] not in ("heuristic", "copy")}
    if not job.is_static:
        blocks = "all" if job.order == "stack" else "1"
        settings |= {"copy.birth": job.birth, "copy.moments": job.moments, "copy.blocks": blocks}
    if job.heuristic:
        settings["heuristic.deepen_order"] = job.order
        settings |= {
            k: v for k, v in {**base.get("settings", {}), **job.settings}.items() if k.startswith("heuristic.")
        }
    if job.grow and not job.heuristic:
        plan = folder / "plan.json"
        plan.write_text(json.dumps({"advance": True, "steps": list(_steps(job))}), encoding="utf-8")
        controller = f"schedule:{plan}"
    values = {
        **{k: v for k, v in base.items() if k != "settings"}, **job.config, "schedule": "wsd",
        "controller": controller, "seed": job.seed, "learning_rate": job.rate, "decay": job.decay,
        "budget_total": f"{job.budget:g}",
        "out": str(folder / "run"), "settings": settings,
    }  # fmt: skip
    return RunConfig.from_mapping(values)


def host_name(base: Mapping[str, Any]) -> str:
    """The part's name of the host in a configuration."""
    return str(base["host"]).partition(":")[0]


def _steps(job: Job) -> list[dict[str, Any]]:
    """Steps of a schedule: a stack grows behind the last block, and the next stack upon it; interleaving once only."""
    told = {"op": "germinate", "blueprint": "copy", "tempo": job.tempo}
    if job.order == "interleave":
        share, _ = job.grow[0]
        prefix, _, index = job.slot.rpartition(".")
        return [{**told, "share": share, "slot": f"{prefix}.{block}"} for block in range(int(index) + 1)]
    shares = [share for share, factor in job.grow for _ in range(int(math.log2(factor)))]
    return [
        {**told, "share": share, "slot": job.slot + (f"+{height}" if height else "")}
        for height, share in enumerate(shares)
    ]


def run_job(job: Job, base: Mapping[str, Any], scratch: Path | None = None) -> dict[str, Any]:
    """Train, read the whole validation text at the end, and return the result.

    Returns:
        The job, with `loss` (nats a token on the whole validation text), `test_loss` (None unless asked for), `params`
        and `blocks` at the end, `steps`, `flops` (training, probes and growth; the last readings of validation and
        test text are not training), `curve` of (FLOPs, validation loss on a few examples) and `seconds`.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=scratch, prefix=f"{job.key}-") as name:
        folder = Path(name)
        config = config_of(job, base, folder)
        result = start_run(config, test=job.test)
        trained = time.monotonic() - began
        events = folder / "run" / "events.jsonl"
        lines = [parse_json(line, events) for line in events.read_text(encoding="utf-8").splitlines()]
        seen = eval_run(folder / "run", split="validation", device=config.device)
        spent = [line["total_flops"] for line in lines if line["kind"] == "epoch_ended"][-1]
        born = [line for line in lines if line["kind"] == "stage_changed" and line["after"] == "germinated"]
        refused = [line for line in lines if line["kind"] in ("command_refused", "rolled_back")]
        shutil.rmtree(folder / "run")
    return {
        **job.to_mapping(), "key": job.key, "loss": seen.loss, "test_loss": result.test_loss, "params": result.params,
        "host_params": result.host_params, "steps": result.steps, "flops": spent,
        "grown_at": [line["step"] / result.steps for line in born], "refused": len(refused),
        "curve": [[line["step"], line["validation_loss"]] for line in lines if line["kind"] == "decided"],
        "train_seconds": round(trained, 1), "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
