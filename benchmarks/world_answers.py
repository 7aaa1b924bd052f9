"""Does the right answer differ between worlds? Contests of fixed schedules and the heuristic, paired with waiting.

Run: python -m benchmarks.world_answers [--seeds N] [--only PART] [--json FILE] [--again CONTENDER]
Each schedule grows one blueprint in every slot at one share of the run. The return is the gain in validation loss over
waiting less the rent (nats), on the same host, batches and order. It goes on where it was stopped: FILE keeps what was
played.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from esper_core.simic.gym.cpu_engine import one_thread
from esper_core.simic.learning.curriculum import World
from esper_core.simic.learning.rollout import contest
from esper_core.tolaria.config import RunConfig

_SHARED: Final[dict[str, Any]] = {
    "epochs": 7, "steps_per_epoch": 10, "batch_size": 32, "decisions_per_epoch": 2, "decision_examples": 128,
    "learning_rate": 4e-3, "budget_params": "", "rewards": ("loss=1", "rent=0.0769"), "blends": ("residual:cosine",),
}  # fmt: skip
_SEQUENCES: Final = ("attention", "ffn", "token_mixer", "norm")
_MAPS: Final = ("conv", "attention", "squeeze_excite", "norm")
_TINY: Final = {"gpt.width": 16, "gpt.layers": 1, "gpt.heads": 1, "gpt.expansion": 0.5}
_COPIES: Final = {
    "host": "gpt", "task": "stdlib", "learning_rate": 1e-2, "blends": ("lerp:linear",),
    "settings": {"gpt.width": 32, "gpt.layers": 1, "gpt.heads": 2, "stdlib.length": 32},
}  # fmt: skip


def worlds() -> dict[str, tuple[dict[str, Any], Sequence[str], Sequence[float]]]:
    """Fields of the run, blueprints on offer, and shares of the run at which they are grown, by name."""
    found: dict[str, tuple[dict[str, Any], Sequence[str], Sequence[float]]] = {}
    for task in ("copy", "recall", "map", "sort"):
        for horizon in (1, 3):
            run = {"host": "gpt", "task": f"synthetic:{task}", "settings": _TINY, "steps_per_epoch": 10 * horizon}
            found[f"gpt {task} ×{horizon}"] = run, _SEQUENCES, (0.05,)
    for task in ("texture", "pair"):
        for pool in ("max", "none"):
            run = {"host": "cnn", "task": f"synthetic:{task}", "settings": {"cnn.widths": "6,6", "cnn.pool": pool}}
            found[f"cnn {task} pool={pool}"] = run, _MAPS, (0.05,)
    signals = {"host": "cnn", "task": "mnist1d", "settings": {"cnn.widths": "6,8,12"}}
    found["cnn signals"] = signals, _SEQUENCES, (0.05,)
    mlp = {"host": "mlp", "task": "digits", "settings": {"mlp.widths": "8,8"}}
    found["mlp digits"] = mlp, ("ffn", "norm", "lora"), (0.05,)
    for rent in (0.05, 0.5):
        run = {"host": "cnn", "task": "digits", "rent": rent, "settings": {"cnn.widths": "4,6", "rent.rate": rent}}
        found[f"cnn digits λ={rent}"] = run, _MAPS, (0.05,)
    for horizon in (3, 10):
        found[f"gpt text ×{horizon}"] = {**_COPIES, "steps_per_epoch": 10 * horizon}, ("copy", "ffn"), (0.1, 0.5)
    return found


def play(name: str, seed: int, folder: Path, only: Sequence[str] = ()) -> dict[str, float]:
    """One contest: the return of each contender, or of `only` those; empty where the host fails by itself."""
    fields, blueprints, times = worlds()[name]
    run = RunConfig.from_mapping({**_SHARED, **fields, "blueprints": tuple(blueprints), "seed": seed})
    contenders = {"wait": "wait", "heuristic": "heuristic"}
    for blueprint in blueprints:
        for share in times:
            path = folder / f"{blueprint}-{share}.toml"
            path.write_text(f'[[steps]]\nshare={share}\nop="germinate"\nslot="*"\nblueprint="{blueprint}"\n'
                            'tempo="fast"\n', encoding="utf-8")  # fmt: skip
            contenders[f"{blueprint} at {share:.0%}"] = f"schedule:{path}"
    contenders = {label: contenders[label] for label in only} if only else contenders
    played = contest({}, World(name=name), run, list(contenders.values()), {})
    return {label: played[reference].total for label, reference in contenders.items()} if played else {}


def main() -> int:
    """Play, print a table, and keep everything in a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--again", default="", help="play this contender anew where FILE has it already")
    told = parser.parse_args()
    kept: dict[str, dict[str, dict[str, float]]] = {}
    if told.json and told.json.exists():
        kept = json.loads(told.json.read_text(encoding="utf-8"))
    print("| world | best | its return | second | its return | heuristic |\n|---|---|---:|---|---:|---:|")
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        for name in worlds():
            if told.only not in name:
                continue
            by_seed = kept.setdefault(name, {})
            for seed in range(told.seeds):
                known = by_seed.get(str(seed), {})
                if str(seed) not in by_seed or told.again in known:
                    only = ("wait", told.again) if told.again in known else ()
                    by_seed[str(seed)] = {**known, **play(name, seed, Path(folder), only)}
                    if told.json:
                        told.json.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            rows = [row for row in by_seed.values() if row]
            if not rows:
                continue
            means = {label: fmean(row[label] for row in rows) for label in rows[0]}
            (best, first), (second, next_) = sorted(
                ((label, mean) for label, mean in means.items() if label != "heuristic"), key=lambda pair: -pair[1]
            )[:2]
            print(
                f"| {name} | {best} | {first:+.3f} | {second} | {next_:+.3f} | {means['heuristic']:+.3f} |", flush=True
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
