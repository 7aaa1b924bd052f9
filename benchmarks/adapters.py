"""How much of what full fine-tuning brings does an adapter bring? Contests on held-out worlds of a domain, paired.

Run: python -m benchmarks.adapters --adapter FILE… --full FILE… [--domain NAME] [--groups N] [--seed N] [--json FILE]
Adapters belong on the core that ships with Esper; agents are that core after `esper tamiyo train --base`. A gain is the
return over that of the core as it ships, in the same contest.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from esper_core.simic.learning.curriculum import load_curriculum
from esper_core.simic.learning.evaluation import EvaluationPlan, evaluate
from esper_core.storage.tensor_file import write_json_file
from esper_core.tamiyo.adapter import load_adapter
from esper_core.tamiyo.core import TamiyoCore
from esper_core.tamiyo.learned import ADAPTED_CORE, load_agent
from esper_core.trials.intervals import paired_interval

BAR = 0.95
"""Share of full fine-tuning's gain that is asked of an adapter."""


def contenders(adapters: Sequence[str], agents: Sequence[str]) -> dict[str, TamiyoCore]:
    """Cores by name: the one that ships, alone and under each adapter, and the agents."""
    cores = {"core": load_agent(ADAPTED_CORE)}
    for file in adapters:
        name = f"adapter {_name(file)}"
        cores[name] = load_agent(ADAPTED_CORE)
        cores[name].attach(load_adapter(file))
    return cores | {f"full {_name(file)}": load_agent(file) for file in agents}


def _name(file: str) -> str:
    """`runs/NAME/agent.safetensors` goes by its folder, everything else by its own name."""
    path = Path(file)
    return path.parent.name if path.stem in ("agent", "adapter") else path.stem


def compare(contests: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For every adapter beside every fully tuned core: what share of the gain, and what is left of the bar.

    Returns:
        `share`: the ratio of the mean gains, and a 95% interval of it over contests drawn again and again from those
        played. `over the bar`: the adapter's gain less `BAR` of the other's, with its paired 95% interval.
    """
    totals = {name: [c["played"][name]["total"] for c in contests] for name in contests[0]["played"]}
    gains = {name: [a - b for a, b in zip(many, totals["core"], strict=True)] for name, many in totals.items()}
    pairs = [(a, f) for a in gains if a.startswith("adapter ") for f in gains if f.startswith("full ")]
    return {
        f"{adapter} of {full}": {
            "share": share(gains[adapter], gains[full]),
            "over the bar": paired_interval(gains[adapter], [BAR * gain for gain in gains[full]]),
        }
        for adapter, full in pairs
    }


def share(ours: Sequence[float], theirs: Sequence[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Ratio of the means with its 95% interval by the bootstrap over pairs."""
    generator, count = random.Random(0), len(ours)
    ratios = []
    for _ in range(draws):
        drawn = generator.choices(range(count), k=count)
        ratios.append(sum(ours[i] for i in drawn) / sum(theirs[i] for i in drawn))
    ratios.sort()
    return fmean(ours) / fmean(theirs), ratios[int(0.025 * draws)], ratios[int(0.975 * draws) - 1]


def main() -> int:
    """Play, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", nargs="+", required=True)
    parser.add_argument("--full", nargs="+", required=True)
    parser.add_argument("--domain", default="language")
    parser.add_argument("--groups", type=int, default=60)
    parser.add_argument("--seed", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--controllers", nargs="*", default=["wait", "schedule", "heuristic"])
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    plan = EvaluationPlan(
        groups=told.groups, seed=told.seed, held_out=True, domain=told.domain, controllers=tuple(told.controllers)
    )
    cores = contenders(told.adapter, told.full)
    result = evaluate(load_curriculum("university"), cores, plan, workers=told.workers,
                      notify=lambda played: print(f"{played} of {told.groups} contests", flush=True))  # fmt: skip
    lineages = {n: next(iter(core.adapters.values())).lineage if core.adapters else core.lineage
                for n, core in cores.items()}  # fmt: skip
    result |= {"compared": compare(result["contests"]), "lineages": lineages}
    table = {
        name: {"return": row["return"], "weight": row["params_ratio"], "minus core": row["minus"].get("core")}
        for name, row in result["summary"].items()
    }
    print(json.dumps({"table": table, "compared": result["compared"]}, indent=1))
    if told.json:
        write_json_file(told.json, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
