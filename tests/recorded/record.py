"""Records the runs of this folder: `python -m tests.recorded.record`, about a minute on two cores."""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from esper_core.kasmina.counterfactual import Measurement
from esper_core.leyline.view import RunView
from esper_core.registry import Registry
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import start_run
from esper_core.tolaria.session import Tolaria
from tests.recorded import HERE, plain
from tests.tolaria import ground

TEXT = Path(ground.__file__).read_text() * 4
"""What the text run reads: source code that has no licence but our own."""


def plant(slot: str, blueprint: str, decision: int, blend: str = "") -> dict[str, Any]:
    return {"decision": decision, "op": "germinate", "slot": slot, "blueprint": blueprint, "blend": blend}


def ask(op: str, slot: str, decision: int) -> dict[str, Any]:
    return {"decision": decision, "op": op, "slot": slot}


def maps(folder: Path) -> RunConfig:
    """Seeds of every family that grows on maps; one drowns the feature and is rolled back, one is withered."""
    seeds = ("conv", "depthwise", "attention", "norm", "noop", "squeeze_excite", "plain", "organ")
    steps = [plant(f"block{i + 1}", name, 1 + i // 2) for i, name in enumerate(seeds)]
    steps[6] = plant("block7", "bomb", 9)
    steps += [plant("block7", "plain", 16, "gated:linear"), ask("wither", "block2", 14), ask("cull", "block2", 18)]
    return ground.config(
        folder / "run", epochs=16, decisions_per_epoch=2, blueprints=("bomb", *seeds),
        blends=("residual:cosine", "gated:linear", "lerp:linear"),
        controller=ground.schedule(folder / "plan.json", *steps), overseers=("emrakul",), checkpoint_every=100,
        budget_params="400%", settings={"cnn.widths": "4,4,6,6,6,8,8,8",
                                        "cnn.pool": "none,none,max,none,none,max,none,none"},
    )  # fmt: skip


def text(folder: Path) -> RunConfig:
    """A GPT-2 of 8 blocks, three points each, with seeds of every family that grows on sequences."""
    (folder / "text.txt").write_text(TEXT)
    seeds = ("attention", "ffn", "moe_router", "token_mixer", "lora", "norm", "swiglu", "bottleneck_adapter", "noop")
    points = [f"transformer.h.{block}{part}" for block in range(8) for part in (".attn", ".mlp", "")]
    steps = [plant(points[2 * i], seeds[i % len(seeds)], 1 + i % 4) for i in range(12)]
    steps += [ask("wither", points[0], 16), ask("revive", points[0], 17), ask("wither", points[2], 12)]
    return RunConfig(
        host="transformers:gpt2", task=f"text:{folder / 'text.txt'}", blueprints=seeds, epochs=12, steps_per_epoch=6,
        controller=ground.schedule(folder / "plan.json", *steps), batch_size=8, decisions_per_epoch=2, device="cpu",
        learning_rate=1e-2, out=str(folder / "run"), checkpoint_every=1000, budget_flops="200%", rent=0.01,
        settings={"transformers.layers": 8, "transformers.width": 16, "transformers.heads": 2, "text.length": 32,
                  "governor.warmup": 10},
    )  # fmt: skip


def record(config: RunConfig, registry: Registry) -> list[RunView]:
    """Carry the run out; what its controller saw at each decision."""
    seen: list[RunView] = []
    true_view = Tolaria.view

    def view(self: Tolaria, measured: Measurement, epoch: float) -> RunView:
        seen.append(true_view(self, measured, epoch))
        return seen[-1]

    with mock.patch.object(Tolaria, "view", view):
        start_run(config, registry=registry)
    return seen


def squeeze(data: bytes) -> bytes:
    return gzip.compress(data, 9, mtime=0)


def keep(name: str, config: RunConfig, folder: Path) -> None:
    views = record(config, ground.registry())
    target = HERE / name
    target.mkdir(exist_ok=True)
    events = (folder / "run" / "events.jsonl").read_bytes().replace(str(folder).encode(), b".")
    (target / "events.jsonl.gz").write_bytes(squeeze(events))
    (target / "views.json.gz").write_bytes(squeeze(json.dumps(plain(views)).encode()))
    (target / "run.json").write_text((folder / "run" / "run.json").read_text().replace(str(folder), "."))
    print(name, len(views), "views,", [path.stat().st_size for path in sorted(target.iterdir())], "bytes")


if __name__ == "__main__":
    for name, build in {"maps": maps, "text": text}.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            keep(name, build(Path(scratch)), Path(scratch))
