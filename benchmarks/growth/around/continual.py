"""P13: a frozen GPT adapted to domains one after the other, and what it then knows of those before.

`python -m benchmarks.growth.around.continual run --folder FOLDER [--keep OUT]`, then `table`. The folder is P12's.

Arms: *seeds* places low-rank seeds by need for each domain upon those of the domains before, which are mute meanwhile;
*LoRA each* has an adapter of peft for each domain; *LoRA one* trains one adapter on; *full* trains every weight;
*replay* does too, and takes half of each batch from the domains before. The first two are told a text's domain.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from benchmarks.growth.around.arms import MEASURED, STRENGTH, Case, lora_budget, registry
from benchmarks.growth.around.hosts import Data, Pair, as_bytes, device, judge, load_host, loss_of, windows_of
from esper_core.kasmina.allocation import allocate_ranks, measure_gains, plant_ranks
from esper_core.kasmina.around import resolve_points
from esper_core.kasmina.module_host import host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.stages import Stage
from esper_core.storage.tensor_file import read_json_file, write_json_file
from esper_core.trials.intervals import paired_interval

DOMAINS: Final = ("german", "french", "c")
STEPS: Final = 400
"""Of each domain."""
BATCH: Final = 32
SHARE: Final = 0.01
"""Of the host's parameters that a domain may add."""
RATES: Final = {"seeds": 1.2e-2, "LoRA each": 1.2e-2, "LoRA one": 1.2e-2, "full": 1e-3, "replay": 1e-3}
"""Peak rates of AdamW: for adapters the one that validation chose in P12, of the GPT and German."""
SEEDS: Final = 5
RESULT: Final = Path(__file__).parents[1] / "results" / "p13.json"
ROWS: Final = "continual.jsonl"


class Texts(Data):
    """The GPT's data for one domain."""

    def __init__(self, domain: str, folder: Path) -> None:
        self.host = "gpt"
        self.texts = {
            split: as_bytes(folder / f"{domain}.{split}").to(device()) for split in ("train", "validation", "test")
        }


@attrs.define
class Learner:
    """A model that learns domains.

    Attributes:
        parameters: begins a domain, by number, and gives what its steps train. at: a context in which the model answers
            for a domain.
        replays: whether half of a batch is of the domains before.
    """

    model: nn.Module
    parameters: Callable[[int], list[nn.Parameter]]
    at: Callable[[int], Any]
    replays: bool = False


def _nothing(domain: int) -> Any:
    @contextmanager
    def same() -> Iterator[None]:
        yield

    return same()


def seeds(case: Case, data: Sequence[Texts]) -> Learner:
    """Seeds of each domain, which are mute for the others."""
    host = host_from_module(case.model, example=case.batches(1)[0][0][:1])  # type: ignore[index]
    points = resolve_points(host, ("around:attn", "mlp"))
    plane = Plane(host, registry(), points=points, blueprints=["lora"], seed=case.seed, max_stack=len(data))
    of: dict[str, int] = {}

    @contextmanager
    def at(domain: int) -> Iterator[None]:
        for path, slot in plane.slots.items():
            slot.muted = of.get(path, domain) != domain
        yield

    def parameters(domain: int) -> list[nn.Parameter]:
        for path in list(of):
            while plane.growths[path].stage is not Stage.FOSSILIZED:
                if not plane.step():
                    plane.advance(path, gated=False)
            plane.slots[path].requires_grad_(False)
        free = [path for path, slot in plane.slots.items() if slot.seed is None]
        batches = attrs.evolve(case, data=data[domain]).batches(MEASURED)

        def loss() -> Tensor:
            return torch.stack([loss_of(case.model, pair) for pair in batches]).mean()

        case.model.eval()
        with at(domain):
            gains = measure_gains(plane, loss, "need", points=free, seed=case.seed)
        ranks = allocate_ranks({path: plane.slots[path].spec for path in free}, gains, case.budget)
        plant_ranks(plane, ranks, strength=STRENGTH)
        of.update(dict.fromkeys(ranks, domain))
        plane.step()
        return [p for path in ranks for p in plane.slots[path].parameters() if p.requires_grad]

    return Learner(case.model, parameters, at)


def lora_each(case: Case, data: Sequence[Texts], *, one: bool = False) -> Learner:
    """An adapter of peft for each domain, or one for all."""
    from peft import LoraConfig, get_peft_model

    host = host_from_module(case.model, example=case.batches(1)[0][0][:1])  # type: ignore[index]
    chosen = [n.removeprefix("around:") for n in resolve_points(host, ("around:attn", "mlp"))]
    each = sum(sum(case.model.get_submodule(path).weight.shape) for path in chosen)
    rank = case.budget // each
    config = LoraConfig(r=rank, lora_alpha=STRENGTH * rank, target_modules=chosen)  # type: ignore[arg-type]
    torch.manual_seed(case.seed)
    model: Any = get_peft_model(case.model, config, adapter_name="0")
    for number in range(1, len(data) if not one else 1):
        model.add_adapter(str(number), config)

    def enter(domain: int) -> None:
        model.set_adapter("0" if one else str(domain))

    @contextmanager
    def at(domain: int) -> Iterator[None]:
        enter(domain)
        yield

    def parameters(domain: int) -> list[nn.Parameter]:
        enter(domain)
        return [p for p in model.parameters() if p.requires_grad]

    return Learner(model, parameters, at)


def full(case: Case, data: Sequence[Texts], *, replays: bool = False) -> Learner:
    """Every weight, domain after domain."""
    case.model.requires_grad_(True)
    return Learner(case.model, lambda domain: list(case.model.parameters()), _nothing, replays)


ARMS: Final[dict[str, Callable[[Case, Sequence[Texts]], Learner]]] = {
    "seeds": seeds,
    "LoRA each": lora_each,
    "LoRA one": lambda case, data: lora_each(case, data, one=True),
    "full": full,
    "replay": lambda case, data: full(case, data, replays=True),
}


def run_job(job: tuple[Path, str, int]) -> dict[str, Any]:
    """Learn every domain in turn; after each, bits a byte of every domain's test text and of the English one's."""
    folder, arm, seed = job
    torch.set_num_threads(1)
    file = folder / "continual" / f"{arm.replace(' ', '-')}_{seed}.json"
    if file.is_file():
        return dict(read_json_file(file))
    began = time.monotonic()
    try:
        row = {"arm": arm, "seed": seed, "rate": RATES[arm], **_learn(folder, arm, seed)}
    except Exception:  # noqa: BLE001 - whatever a library raises: the other jobs go on
        return {"arm": arm, "seed": seed, "error": traceback.format_exc()}
    row["wall_s"] = time.monotonic() - began
    file.parent.mkdir(exist_ok=True)
    write_json_file(file, row)
    return row


def _learn(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    data = [Texts(domain, folder) for domain in DOMAINS]
    model, params = load_host("gpt", folder)
    case = Case("gpt", model, data[0], round(SHARE * params), seed, STEPS, BATCH)
    learner = ARMS[arm](attrs.evolve(case, budget=lora_budget(case)), data)
    generator = torch.Generator().manual_seed(seed)
    judged = [each.judged("test") for each in data]
    bits, trained = [_bits(learner, judged)], []
    for domain in range(len(DOMAINS)):
        parameters = learner.parameters(domain)
        trained.append(sum(p.numel() for p in parameters))
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=device().type == "cuda")
        learner.model.train()
        with learner.at(domain):
            for step in range(STEPS):
                share = min(1.0, (step + 1) / (0.06 * STEPS), (STEPS - step) / (0.7 * STEPS))
                for group in optimizer.param_groups:
                    group["lr"] = RATES[arm] * share
                loss_of(learner.model, _batch(data, domain, generator, learner.replays)).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        bits.append(_bits(learner, judged))
    return {"bits": bits, "trained": trained}


def _batch(data: Sequence[Texts], domain: int, generator: torch.Generator, replays: bool) -> Pair:
    if not replays or domain == 0:
        return data[domain].draw(BATCH, generator)
    earlier = int(torch.randint(domain, (), generator=generator))
    parts = [windows_of(data[number].texts["train"], BATCH // 2, generator) for number in (domain, earlier)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _bits(learner: Learner, judged: Sequence[list[Pair]]) -> list[float]:
    found = []
    for domain, batches in enumerate(judged):
        with learner.at(domain):
            found.append(judge(learner.model, batches)[0] / math.log(2))
    return found


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean bits at the end, bits when each domain had just been learned, and forgetting: what was lost since."""
    lines = []
    by_arm = {arm: sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["seed"]) for arm in ARMS}
    ends = {arm: [fmean(row["bits"][-1]) for row in mine] for arm, mine in by_arm.items()}
    for arm, mine in by_arm.items():
        if not mine:
            continue
        lost = [[row["bits"][-1][d] - row["bits"][d + 1][d] for d in range(len(DOMAINS) - 1)] for row in mine]
        line: dict[str, Any] = {
            "arm": arm, "seeds": len(mine), "end": fmean(ends[arm]), "trained": mine[0]["trained"],
            "learned": [fmean(row["bits"][d + 1][d] for row in mine) for d in range(len(DOMAINS))],
            "forgotten": [fmean(found[d] for found in lost) for d in range(len(DOMAINS) - 1)],
            "most forgotten": max(map(max, lost)),
        }  # fmt: skip
        if arm != "seeds" and len(mine) == len(ends["seeds"]) > 1:
            mean, low, high = paired_interval(ends["seeds"], ends[arm])
            line["seeds less this"] = [mean, low, high]
        lines.append(line)
    return lines


def main() -> None:
    """Parse, do."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("--folder", type=Path, default=Path("runs/p12"))
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0))))
    parser.add_argument("--keep", type=Path, default=None, help=f"a folder for {ROWS}")
    args = parser.parse_args()
    jobs = [(args.folder, arm, seed) for seed in range(SEEDS) for arm in ARMS]
    if args.verb == "run":
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
            for future in as_completed([pool.submit(run_job, job) for job in jobs]):
                row = future.result()
                print(row["arm"], row["seed"], row.get("error", row.get("bits")), row.get("wall_s"), flush=True)
                if args.keep is not None:
                    with (args.keep / ROWS).open("a", encoding="utf-8") as out:
                        out.write(json.dumps(row) + "\n")
        return
    files = sorted((args.folder / "continual").glob("*.json"))
    rows = [dict(read_json_file(file)) for file in files]
    lines = summarise(rows)
    for line in lines:
        print(line)
    about = {"protocol": "p13", "domains": DOMAINS, "steps": STEPS, "batch": BATCH, "rates": RATES}
    write_json_file(RESULT, {**about, "arms": lines, "runs": rows})


if __name__ == "__main__":
    main()
