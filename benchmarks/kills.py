"""Kills runs at random moments and resumes them: not one bit may differ from an uninterrupted run.

`python -m benchmarks.kills [--kills 200] [--into runs/kills]` goes on where it stopped: each configuration's reference
is kept, and every run that was killed and got through is a line in `kills.jsonl`. It ends with 1 at the first
difference.

Weights, structure, event log and `result.json` are compared by digest, see `tests.tolaria.ground.fingerprint`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Final

from esper_core.tolaria.config import RunConfig
from tests.tolaria import ground
from tests.tolaria.killing import in_process, kill_until_done, start

_STEPS: Final = (
    {"decision": 0, "op": "germinate", "slot": "block1", "blueprint": "plain", "tempo": "fast"},
    {"decision": 1, "op": "germinate", "slot": "block2", "blueprint": "bomb", "tempo": "fast"},
)

CONFIGURATIONS: Final[dict[str, dict[str, Any]]] = {
    "scheduled": {"schedule_steps": _STEPS},
    "host alone": {"controller": "wait"},
    "random": {"controller": "random"},
    "heuristic": {"controller": "heuristic"},
    "learned": {"controller": "agent", "blueprints": ("depthwise", "attention")},
    "audited": {"controller": "random", "overseers": ("emrakul",)},
    "regions": {"controller": "random", "overseers": ("narset",)},
    "stacked": {"controller": "random", "settings": {"plane.max_stack": 3}},
    "sgd": {"optimizer": "sgd", "controller": "random", "clip": 1.0},
    "gated": {"controller": "random", "blends": ("gated:sigmoid", "lerp:linear")},
    "fast checks": {"schedule_steps": _STEPS, "settings": {"governor.check_every": 1}, "checkpoint_every": 1},
    "slow checkpoints": {"schedule_steps": _STEPS, "checkpoint_every": 11},
    "budget": {"controller": "random", "budget_params": "60%", "schedule": "cosine"},
    "vectors": {"host": "mlp", "blueprints": ("bottleneck_adapter", "ffn"), "controller": "random"},
}
"""Fourteen kinds of run, as changes of `tests.tolaria.ground.config`."""


def configure(name: str, folder: Path, out: Path) -> RunConfig:
    """The configuration of that name, to be run in `out`."""
    changes = dict(CONFIGURATIONS[name])
    steps = changes.pop("schedule_steps", None)
    if steps:
        changes["controller"] = ground.schedule(folder / f"{name.replace(' ', '-')}.json", *steps)
    config = ground.config(out, **changes)
    if changes.get("host") == "mlp":
        import attrs

        kept = {key: value for key, value in config.settings.items() if not key.startswith("cnn.")}
        config = attrs.evolve(config, settings=kept)
    return config


def kill_and_compare(name: str, into: Path, number: int, longest: float) -> tuple[int, dict[str, str]]:
    """Kill one run up to four times and let it get through; how often it was killed, and its fingerprint."""
    out = into / f"{name.replace(' ', '-')}-{number}"
    shutil.rmtree(out, ignore_errors=True)
    kills = kill_until_done(configure(name, into, out), random.Random(f"{name} {number}"), longest)
    found = ground.fingerprint(out)
    shutil.rmtree(out)
    return kills, found


def reference(name: str, into: Path) -> tuple[dict[str, str], float]:
    """Fingerprint of the undisturbed run, and the seconds that it took; kept in a file."""
    kept = into / f"{name.replace(' ', '-')}.reference.json"
    if not kept.exists():
        out = into / "reference"
        shutil.rmtree(out, ignore_errors=True)
        in_process(int)  # the server is up
        began = time.monotonic()
        in_process(start, configure(name, into, out))
        kept.write_text(json.dumps([ground.fingerprint(out), time.monotonic() - began]))
        shutil.rmtree(out)
    found, seconds = json.loads(kept.read_text())
    return found, float(seconds)


def main() -> None:
    """Kill until there are enough, over all configurations alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--into", type=Path, default=Path("runs/kills"))
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    log = options.into / "kills.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    kills, number = sum(line["kills"] for line in lines), len(lines)
    names = list(CONFIGURATIONS)
    while kills < options.kills:
        name = names[number % len(names)]
        expected, seconds = reference(name, options.into)
        times, found = kill_and_compare(name, options.into, number, 1.1 * seconds)
        kills, number = kills + times, number + 1
        line = {"configuration": name, "number": number, "kills": times, "identical": found == expected}
        with open(log, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{kills} of {options.kills} kills; {name}: {'identical' if found == expected else 'DIFFERENT'}")
        if found != expected:
            sys.exit(f"{name} differs in {', '.join(key for key in expected if expected[key] != found[key])}")


if __name__ == "__main__":
    main()
