"""Jobs of P12: an arm trained once in one cell of host and budget, and the queue of all of them.

Rates are chosen for each arm, host and budget on a seed of its own, among as many for every arm, by validation loss.
The other seeds then run at the chosen rate and read the test split once, at their end. A job is one file: a queue that
was stopped goes on.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from torch import nn

from benchmarks.growth.around.arms import ARMS, Case, NotInCell, full, lora_budget
from benchmarks.growth.around.hosts import HOSTS, Data, device, judge, load_host, loss_of
from esper_core.storage.tensor_file import read_json_file, write_json_file

BUDGETS: Final = (0.001, 0.003, 0.01, 0.03)
"""Added parameters over the host's."""
ORDER: Final = (
    *((host, 0.01) for host in ("minilm", "vit", "gpt")),
    *((host, budget) for budget in (0.003, 0.03, 0.001) for host in ("vit", "minilm", "gpt")),
)
"""Cells of host and budget, as they are run."""
TUNING: Final = 100
"""The seed on which rates are chosen."""
SEEDS: Final = 5
STEPS: Final = {"minilm": 400, "vit": 400, "gpt": 400}
BATCH: Final = {"minilm": 32, "vit": 64, "gpt": 32}
_LOW_RANK: Final = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
RATES: Final[dict[str, tuple[float, ...]]] = {"VeRA": (5e-3, 2e-2, 5e-2, 1e-1), "full": (1e-4, 3e-4, 1e-3, 3e-3)}
"""Peak rates of AdamW by arm, four each; of others `_LOW_RANK`."""
HIGHER: Final = {"gpt": 2.0}
"""Factor on the rates of a host, whose arms with additions were all best at the highest of the others' rates."""
HEAD_RATE: Final = 1e-3
"""Of the head of MiniLM and of the ViT, in every arm."""


@attrs.frozen
class Job:
    """One training run. `budget` is 0 for an arm without additions."""

    folder: Path
    host: str
    arm: str
    budget: float
    rate: float
    seed: int

    @property
    def file(self) -> Path:
        """Where its outcome is written when it is done."""
        arm = self.arm.replace(" ", "-")
        return self.folder / "runs" / f"{self.host}_{arm}_{self.budget:g}_{self.rate:g}_{self.seed}.json"


def cells() -> list[tuple[str, str, float]]:
    """Host, arm and budget of every cell, in the order in which they are run."""
    found = [(host, arm, budget) for host, budget in ORDER for arm in ARMS]
    return found + [(host, "full", 0.0) for host in HOSTS]


def rates_of(host: str, arm: str) -> tuple[float, ...]:
    """The rates among which validation chooses for an arm."""
    factor = 1.0 if arm == "full" else HIGHER.get(host, 1.0)
    return tuple(factor * rate for rate in RATES.get(arm, _LOW_RANK))


def tuning(folder: Path) -> list[Job]:
    """The jobs by which rates are chosen."""
    return [Job(folder, *cell, rate, TUNING) for cell in cells() for rate in rates_of(*cell[:2])]


def choose(folder: Path, *, earlier: bool = False) -> dict[tuple[str, str, float], float]:
    """The rate of the lowest validation loss for each cell whose rates have all been tried.

    Args:
        earlier: take those without `HIGHER` where the others have not all been tried.
    """
    chosen = {}
    for cell in cells():
        for rates in (rates_of(*cell[:2]), rates_of("", cell[1]))[: 1 + earlier]:
            files = [Job(folder, *cell, rate, TUNING).file for rate in rates]
            if cell not in chosen and all(file.is_file() for file in files):
                rows = [_row(file) for file in files]
                if not any(row.get("absent") for row in rows):
                    chosen[cell] = float(min(rows, key=lambda row: row["validation_loss"])["rate"])
    return chosen


@cache
def _row(file: Path) -> dict[str, Any]:
    return dict(read_json_file(file))


def finals(folder: Path, seeds: int = SEEDS, *, earlier: bool = False) -> list[Job]:
    """The jobs that are compared, seed by seed, of the cells whose rates are chosen."""
    chosen = choose(folder, earlier=earlier)
    return [Job(folder, *cell, rate, seed) for seed in range(seeds) for cell, rate in chosen.items()]


def missing(folder: Path, seeds: int = SEEDS) -> list[Job]:
    """What can be done now, cell by cell: its tuning, then its seeds. When tuning ends there is more."""
    order = {(host, budget): number for number, (host, _, budget) in reversed(list(enumerate(cells())))}
    left = [
        job for job in (*tuning(folder), *finals(folder, seeds))
        if not job.file.is_file() and (folder / f"{job.host}.safetensors").is_file()
    ]  # fmt: skip
    return sorted(left, key=lambda job: order[job.host, job.budget])


def run_job(job: Job) -> dict[str, Any]:
    """Adapt once, and write what came of it; an arm that fails leaves its error and no file."""
    if job.file.is_file():
        return dict(read_json_file(job.file))
    began, busy = time.monotonic(), time.process_time()
    head = {"host": job.host, "arm": job.arm, "budget": job.budget, "rate": job.rate, "seed": job.seed}
    try:
        outcome = {**head, **_train(job)}
    except NotInCell as error:
        outcome = {**head, "absent": str(error)}
    except Exception:  # noqa: BLE001 - whatever a library raises: the other jobs go on
        return {**head, "error": traceback.format_exc()}
    outcome |= {"device": device().type, "cpu_s": time.process_time() - busy, "wall_s": time.monotonic() - began}
    job.file.parent.mkdir(exist_ok=True)
    write_json_file(job.file, outcome)
    return outcome


@cache
def _data(host: str, folder: Path) -> Data:
    return Data(host, folder)


def _train(job: Job) -> dict[str, Any]:
    data, (model, params) = _data(job.host, job.folder), load_host(job.host, job.folder)
    steps = STEPS[job.host]
    heads = [p for p in model.parameters() if p.requires_grad]
    case = Case(job.host, model, data, round(job.budget * params), job.seed, steps, BATCH[job.host])
    if job.budget:
        case = attrs.evolve(case, budget=lora_budget(case))
    made = full(case) if job.arm == "full" else ARMS[job.arm](case)
    if job.arm == "full":
        made.added = [p for p in model.parameters() if not any(p is head for head in heads)]
    groups = [{"params": made.added, "peak": job.rate}, {"params": heads, "peak": HEAD_RATE}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=device().type == "cuda")
    generator = torch.Generator().manual_seed(job.seed)
    torch.manual_seed(job.seed)
    made.model.train()
    for step in range(steps):  # the first group is that of `made.added`
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / (0.06 * steps), (steps - step) / (0.7 * steps))
        loss = loss_of(made.model, data.draw(case.batch, generator))
        (loss if made.extra is None else loss + made.extra()).backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        made.after(step + 1, optimizer)
        optimizer.zero_grad()
    loss_v, share_v = judge(made.model, data.judged("validation"))
    loss_t, share_t = (None, None) if job.seed == TUNING else judge(made.model, data.judged("test"))
    return {
        "steps": steps, "added": made.count, "trained": sum(p.numel() for p in made.added), "layers": made.layers,
        "validation_loss": loss_v, "validation_share": share_v, "loss": loss_t, "share": share_t,
    }  # fmt: skip


def rows_of(jobs: Iterable[Job]) -> list[Mapping[str, Any]]:
    """What is done of some jobs."""
    return [dict(read_json_file(job.file)) for job in jobs if job.file.is_file()]
