"""Mutants: faults put into the core one at a time, each of which a named test must notice.

`python -m benchmarks.mutants [NAME …]` copies the core, changes one line of the copy, runs the test against it, and
ends with 1 if a test passes all the same. First every test must pass on the core as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import attrs

ROOT: Final = Path(__file__).parents[1]


@attrs.frozen
class Mutant:
    """A fault: in `file` of the core, `before` becomes `after`; `test` is what pytest is called with."""

    file: str
    before: str
    after: str
    test: tuple[str, ...]


_VIEWS: Final = ("tests/tamiyo/test_recorded.py",)

MUTANTS: Final = {
    "the governor is never tight": Mutant(
        "tolaria/governor.py", "self.tight = any(stage.spec.tight for stage in stages)", "self.tight = False",
        ("tests/tolaria/test_governor.py", "-k", "tight"),
    ),
    "fossils_every is ignored": Mutant(
        "tolaria/measuring.py", "decision % tolaria.fossils_every == 0", "decision % 1 == 0",
        ("tests/tolaria/test_fossils.py",),
    ),
    "sensors.fossils does not arrive": Mutant(
        "tolaria/setup.py", "fossils_every=sensing.fossils", "fossils_every=1", ("tests/tolaria/test_fossils.py",),
    ),
    "views lose what was culled": Mutant("kasmina/plane_view.py", "culled=growth.culled,", "", _VIEWS),
    "views lose the seed's family": Mutant(
        "kasmina/plane_view.py", 'seed_family=grown.family if grown else ""', 'seed_family=""', _VIEWS
    ),
    "views lose the seed's tags": Mutant(
        "kasmina/plane_view.py", "seed_tags=grown.capabilities if grown else frozenset()", "seed_tags=frozenset()",
        _VIEWS,
    ),
    "features do not read the seed's family": Mutant(
        "tamiyo/features.py", "lambda s, r: s.seed_family", 'lambda s, r: ""', _VIEWS
    ),
    "features do not read a candidate's family": Mutant(
        "tamiyo/features.py", "lambda b, s, r: b.family", 'lambda b, s, r: ""', _VIEWS
    ),
    "worlds are drawn alike": Mutant(
        "simic/learning/curriculum.py", "[w.weight for w in worlds]", "[1.0 for w in worlds]",
        ("tests/simic/test_curriculum.py", "-k", "weights"),
    ),
    "a rollback does not end sharing": Mutant(
        "simic/gym/member.py", "(self.tolaria.governor.rollbacks == trunk.tolaria.governor.rollbacks == 0)", "True",
        ("tests/simic/test_cohort.py", "-k", "rollback"),
    ),
}  # fmt: skip


def passes(test: tuple[str, ...], mutant: Mutant | None = None) -> bool:
    """Whether `test` passes with a copy of the core, which has the fault if one is given.

    Raises:
        SystemExit: the line to change is not there exactly once, or pytest ran no test.
    """
    with tempfile.TemporaryDirectory() as folder:
        core = Path(folder, "esper_core")
        shutil.copytree(ROOT / "esper_core", core, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant is not None:
            text = (core / mutant.file).read_text(encoding="utf-8")
            if text.count(mutant.before) != 1:
                raise SystemExit(f"{mutant.file} holds {mutant.before!r} {text.count(mutant.before)} times, not once")
            (core / mutant.file).write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
        paths = [folder, ROOT, *(ROOT / name for name in ("hosts", "blueprints", "plugins"))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", *test]  # -P: the copy comes before this folder
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode > 1:
        raise SystemExit(f"pytest {' '.join(test)} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of mutants; all by default")
    names = parser.parse_args().names or list(MUTANTS)
    for test in dict.fromkeys(MUTANTS[name].test for name in names):
        if not passes(test):
            raise SystemExit(f"pytest {' '.join(test)} fails on the core as it is")
    survivors = []
    for name in names:
        alive = passes(MUTANTS[name].test, MUTANTS[name])
        print(f"{'SURVIVES' if alive else 'killed  '}  {name}  ({' '.join(MUTANTS[name].test)})", flush=True)
        survivors += [name] * alive
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
