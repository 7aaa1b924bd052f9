"""Counts what the processes of a step exchange: a run of Esper's, and a loop written by hand with `fully_shard`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from esper_core.registry import load_registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.processes import build, join, leave
from esper_core.tolaria.run import build_trainer
from esper_core.tolaria.setup import set_up, spread
from esper_hosts.gpt import GPT
from esper_plugins.tasks.tokens import task_of_parts

BLOCKS, STEPS = 3, 4


def count(folder: str) -> dict[str, dict[str, float]]:
    """Exchanges a step, by kind: of runs that keep parameters whole and that do not, before and after growth."""
    join("cpu", "ddp")
    found = {"by hand": _counted(_by_hand())}
    for name, keep in (("kept", 1.0), ("not kept", 0.0)):
        trainer = _trainer(Path(folder) / name, keep)
        batches = trainer._batches()

        def step(trainer: Any = trainer, batches: Any = batches) -> None:
            trainer.step(next(batches))
            trainer.position.batch += 1

        found[name] = _counted(step)
        for _ in range(2):  # a copy of the last block, then a seed
            trainer.decide()
        assert trainer.tolaria.plane.ledger.seed_params
        found[f"{name}, grown"] = _counted(step)
        found[f"{name}, a decision"] = _counted(trainer.decide, warm=0, steps=1)
        found[f"{name}, grown"]["whole"] = sum(
            not hasattr(p, "to_local") for p in (*trainer.tolaria.plane.host.module.parameters(),
                                                 *trainer.tolaria.plane.module.parameters())
        )  # fmt: skip
    leave()
    return found


def _counted(step: Callable[[], object], warm: int = 2, steps: int = STEPS) -> dict[str, float]:
    for _ in range(warm):  # what happens in the first step alone
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    kinds = Counter[str]()
    for event in profiler.key_averages():
        for kind in ("allgather", "reduce_scatter"):  # and now and then figures of the sensors
            if event.key.startswith("c10d::") and kind in event.key:
                kinds[kind] += event.count / steps
    return dict(kinds)


def _by_hand() -> Callable[[], object]:
    model = GPT(97, BLOCKS, 16, 1, 8, 4.0, False)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, 97, (2, 9))

    def step() -> None:
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _trainer(folder: Path, keep: float) -> Any:
    folder.mkdir(exist_ok=True)
    steps = [{"op": "germinate", "slot": f"blocks.{BLOCKS - 1}", "blueprint": "copy", "tempo": "instant",
              "options": {"blocks": "1"}, "decision": 1}]  # fmt: skip
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"advance": True, "steps": steps}))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 97, (windows * 8 + 1,), generator=generator) for windows in (160, 8, 4)]
    ranks = build(torch.device("cpu"), "fsdp2")
    config = RunConfig(
        host="gpt", task="stdlib", blueprints=("copy",), controller=f"schedule:{plan}", epochs=1, strategy="fsdp2",
        batch_size=4, budget_params="", device="cpu", decision_examples=4,
        settings={"gpt.width": 16, "gpt.layers": BLOCKS, "fsdp2.keep": keep, "governor.check_every": 100},
    )  # fmt: skip
    setup = set_up(config, load_registry(), task=task_of_parts("random", rows, 97, 8), ranks=ranks)
    spread(setup, ranks)
    return build_trainer(setup, {}, keeps=False)
