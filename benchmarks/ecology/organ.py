"""An organ with seeds inside against one flat seed of equal parameters and FLOPs, in the same slot from the same epoch.

`organ` grows an organ and then a seed behind each of its blocks; `flat` grows one ConvNeXt block whose expansion is
chosen so that it weighs what the organ's tree weighs; `host` grows nothing. Runs of one seed share weights and order.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from benchmarks.ecology.books import Books
from benchmarks.ecology.rows import interval
from esper_blueprints import convnext, depthwise
from esper_blueprints.organ import OrganSeed
from esper_blueprints.organ import estimate as organ_cost
from esper_core.leyline.errors import RunFailed
from esper_core.leyline.injection import InjectionSpec
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.run import start_run

SEEDS: Final = 5
EPOCHS: Final = 60
ARMS: Final = ("organ", "flat", "host")
POINT: Final = InjectionSpec("block1", 16, "NCHW", 0, (16, 4, 4))
"""Where both grow: behind the first block of a cnn of widths 16 and 32 on digits."""
ORGAN: Final = {"blocks": 2, "expansion": 1.0, "init": "zero"}
INSIDE: Final = {"kernel_size": 3, "init": "zero"}


def tree_cost() -> tuple[int, int]:
    """Parameters and FLOPs of the organ with a depthwise seed behind each of its blocks."""
    seed = OrganSeed(POINT, **ORGAN)
    costs = [organ_cost(POINT, **ORGAN)]
    costs += [depthwise.estimate(inner, **INSIDE) for inner in seed.injection_specs.values()]
    return sum(params for params, _ in costs), sum(flops for _, flops in costs)


def flat_options() -> dict[str, Any]:
    """Options of the flat seed whose parameters come nearest to the organ's tree."""
    wanted, _ = tree_cost()
    choices = [{"kernel_size": 3, "expansion": middle / POINT.channels, "init": "zero"} for middle in range(1, 256)]
    return min(choices, key=lambda options: abs(convnext.estimate(POINT, **options)[0] - wanted))


def jobs(seeds: int | None, small: bool) -> list[dict[str, Any]]:
    """Three jobs a seed; `small` has a sixth of the epochs."""
    epochs = EPOCHS // 6 if small else EPOCHS
    return [{"arm": arm, "seed": seed, "epochs": epochs} for seed in range(seeds or SEEDS) for arm in ARMS]


def _plan(arm: str, epoch: int) -> dict[str, Any]:
    def plant(slot: str, blueprint: str, options: Mapping[str, Any]) -> dict[str, Any]:
        about = {"op": "germinate", "slot": slot, "blueprint": blueprint, "options": options}
        return {**about, "epoch": epoch, "tempo": "fast"}

    if arm == "flat":
        return {"steps": [plant("block1", "convnext", flat_options())]}
    inside = [plant(f"block1/block{number}", "depthwise", INSIDE) for number in range(ORGAN["blocks"])]
    return {"steps": [plant("block1", "organ", ORGAN), *inside]}


def work(job: Mapping[str, Any]) -> dict[str, Any]:
    """One run; what it cost and brought."""
    arm, epochs = job["arm"], job["epochs"]
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.json"
        plan.write_text(json.dumps(_plan(arm, epochs // 10)), encoding="utf-8")
        config = RunConfig(
            host="cnn", task="digits", blueprints=("organ", "depthwise", "convnext"), slots=("block1",),
            budget_params="", controller="wait" if arm == "host" else f"schedule:{plan}", seed=job["seed"],
            epochs=epochs, decisions_per_epoch=1, decision_examples=0, device="cpu",
            settings={"cnn.widths": "16,32", "cnn.pool": "stride", "plane.ramp": 0.05},
        )  # fmt: skip
        books = Books()
        try:
            result = start_run(config, {"books": books}, keep=False)
            status, accuracy, loss = result.status, result.test_score, result.test_loss
        except RunFailed as error:
            status, accuracy, loss = f"failed: {error}", None, None
    last = books.curve[-1]
    return {
        "status": status, "test_accuracy": accuracy, "test_loss": loss, "validation_loss": last["validation_loss"],
        "seed_params": last["seed_params"], "flops": last["flops"], "seeds": last["seeds"], "story": books.story,
        "curve": [[row["epoch"], row["validation_loss"]] for row in books.curve],
    }  # fmt: skip


def judge(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Organ less flat seed and organ less host, paired by seed; negative losses are the organ's gain."""
    by_arm = {arm: [row for row in rows if row["job"]["arm"] == arm] for arm in ARMS}
    found: dict[str, Any] = {"tree": tree_cost(), "flat": convnext.estimate(POINT, **flat_options())}
    for name in ("validation_loss", "test_loss", "test_accuracy", "flops", "seed_params"):
        values = {arm: [row[name] for row in mine] for arm, mine in by_arm.items()}
        found[name] = {
            **{arm: fmean(numbers) for arm, numbers in values.items()},
            "organ less flat": interval(values["organ"], values["flat"]),
            "organ less host": interval(values["organ"], values["host"]),
        }
    params, flops = found["seed_params"], found["flops"]
    grown = [row["seeds"] for row in by_arm["organ"]]
    bars = [
        ("seeds alive in the organ's runs", min(grown), min(grown) == 1 + ORGAN["blocks"]),
        ("parameters, organ over flat", r := params["organ"] / params["flat"], abs(r - 1) < 0.02),
        ("training FLOPs, organ over flat", r := flops["organ"] / flops["flat"], abs(r - 1) < 0.05),
        ("runs failed", bad := sum(row["status"] != "finished" for row in rows), bad == 0),
        ("test loss, organ less flat", r := found["test_loss"]["organ less flat"], r["high"] < 0),
    ]
    return {"found": found, "bars": [{"bar": b, "value": v, "met": m} for b, v, m in bars]}
