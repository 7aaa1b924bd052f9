"""Draws the rates that `benchmarks.at_scale` needs from what the pieces told.

Run: python -m benchmarks.several_gpus.rates FOLDER [--json FILE]   (FOLDER holds links.jsonl and billion.jsonl)
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def rates_of(links: Sequence[Mapping[str, Any]], billion: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates and blocks as `at_scale.report` takes them.

    A deepening is the decision that deepened, less an ordinary one before it; the first decision of a run is no such.
    """
    rows = {row["stage"]: row for row in links if row["stage"] != "block"}
    blocks = {
        str(int(row["width"])): {"mfu_kept": row["mfu"], "mfu_recomputed": row["mfu_recomputed"]}
        for row in links
        if row["stage"] == "block"
    }
    bus, copies = rows["exchanges"]["bus_bytes_a_second"], rows["copies"]["a_second"]
    training = [row for row in billion if row["stage"] == "training"]
    deep = [row for row in training if row["deepened"]]
    usual = [row["decision_seconds"] for row in training[1 : training.index(deep[0])]] if deep else []
    each = (deep[0]["decision_seconds"] - statistics.median(usual)) / deep[0]["layers"] if usual else None
    return {
        "device": rows["machine"]["device"],
        "rates": {
            "all_gather": bus["all_gather_bfloat16"], "reduce_scatter": bus["reduce_scatter_float32"],
            "copy_on_device": 2 * copies["copy_on_device"],  # read and written
            "copy_to_cpu": copies["copy_to_cpu"], "sha256": copies["sha256"], "seconds_to_copy_a_block": each,
        },
        "blocks": blocks,
    }  # fmt: skip


def main() -> None:
    """Print or write the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    links, billion = (
        [json.loads(line) for line in (asked.folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("links", "billion")
    )
    text = json.dumps(rates_of(links, billion), indent=1) + "\n"
    if asked.json:
        asked.json.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
