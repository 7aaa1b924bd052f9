"""How much 200 installed plugin packages slow `esper plugins list --json` and `esper --help`.

    python -m benchmarks.many_plugins [--plugins 200] [--runs 15] [--json]

Each package is a folder of its own with a `.dist-info`, as pip leaves it, and a module that registers one blueprint and
imports nothing heavy. The commands run in turn without and with them. Listing may take 2.5 times as long with them;
help must not notice them (its bar leaves room for the longer path only).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.startup import machine, measure

BARS = {"esper plugins list --json": 2.5, "esper --help": 1.25}
COMMANDS: Mapping[str, Sequence[str]] = {
    "esper plugins list --json": ("-m", "esper_core", "plugins", "list", "--json"),
    "esper --help": ("-m", "esper_core", "--help"),
}
MODULE = '''"""Registers one blueprint."""

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import Option
from esper_core.leyline.specs import BlueprintSpec


@hookimpl
def esper_blueprints():
    """The blueprint of this package."""
    return [
        BlueprintSpec(
            name="grown{index:03d}", summary="a blueprint of package {index}", family="convolution", layouts=("NCHW",),
            factory="grown_{index:03d}.seed:build", estimate="grown_{index:03d}.seed:estimate",
            options=(Option("width", "int", 3, "width", minimum=1),), sensors=("gradient_norm",),
            needs=("spatial",), capabilities=("learned",),
        )
    ]
'''


def install_packages(site: Path, count: int) -> None:
    """Lay `count` plugin packages out in the folder `site`."""
    for index in range(count):
        package = site / f"grown_{index:03d}"
        package.mkdir()
        package.joinpath("__init__.py").write_text("")
        package.joinpath("plugin.py").write_text(
            MODULE.replace("{index:03d}", f"{index:03d}").replace("{index}", str(index))
        )
        info = site / f"grown_{index:03d}-1.0.dist-info"
        info.mkdir()
        info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: grown-{index:03d}\nVersion: 1.0\n")
        info.joinpath("entry_points.txt").write_text(f"[esper_core]\nplugin = grown_{index:03d}.plugin\n")


def main() -> int:
    """Measure, print, and return 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugins", type=int, default=200)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as site:
        install_packages(Path(site), arguments.plugins)
        none, many = measure(COMMANDS, arguments.runs, environments=({}, {"PYTHONPATH": site}))
    medians = {name: (statistics.median(none[name]), statistics.median(many[name])) for name in COMMANDS}
    ratios = {name: with_them / without for name, (without, with_them) in medians.items()}
    met = all(ratios[name] <= bar for name, bar in BARS.items())
    if arguments.json:
        answer = {"machine": machine(), "plugins": arguments.plugins, "runs": arguments.runs, "bars": BARS}
        print(json.dumps({**answer, "seconds": medians, "ratios": ratios, "met": met}, indent=2))
    else:
        for name, (without, with_them) in medians.items():
            print(
                f"{name:<27} {1000 * without:7.1f} ms without, {1000 * with_them:7.1f} ms with {arguments.plugins} "
                f"plugins   × {ratios[name]:.2f} (bar × {BARS[name]})"
            )
        print(f"{'met' if met else 'MISSED'} (medians of {arguments.runs} interleaved runs)")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
