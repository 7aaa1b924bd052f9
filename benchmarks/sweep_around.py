"""Slots around layers on 30 hosts of timm and 15 of transformers: silent at birth to the bit, trained, merged.

python -m benchmarks.sweep_around --workers 2
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import timm
import torch
import transformers
from torch import Tensor

from benchmarks import sweep_timm, sweep_transformers
from benchmarks.host_check import _loss, _same, _seeded, fast_initialisation, quiet_forever, ready_registry, stage, wake
from benchmarks.sweeping import arguments, read_results, sweep
from esper_core.kasmina.around import resolve_points
from esper_core.kasmina.compose import compose
from esper_core.kasmina.merging import merge_all
from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.kasmina.plane import Plane
from esper_core.leyline.actions import Tempo
from esper_hosts.timm import build_empty, choose_size

ROWS, PAGE = "benchmarks/results/sweep-around.jsonl", "docs/sweep-around.md"
SAMPLES: Final = {"timm": (sweep_timm.ROWS, 30), "transformers": (sweep_transformers.ROWS, 15)}
LARGEST: Final = 60_000_000
"""Parameters of a host at most: whole models are copied here, once for each state."""
BLUEPRINTS: Final = {"linear": "lora", "embedding": "lora", "conv": "lora_conv"}
LIMIT: Final = 1e-5
"""Of the largest logit: by how much a merged model may differ."""

TEXT: Final = f"""Hosts with random weights: {{counts}}, evenly spread over the names of the sweeps of all hosts, up to
{LARGEST / 1e6:.0f}M parameters ({{versions}}). Around every linear layer, convolution and embedding that offers a point
stands a low-rank seed of rank 2 at α = 1. The output is that of the bare host **to the bit** with dormant slots and at
the seeds' birth. Then seeds get gradients, and random weights of scale 0.02. The plain model (`compose`), the host with
the seeds merged, and the host with them taken out again give the logits of host and seeds within {LIMIT:g} of the
largest logit.

Command: `python -m benchmarks.sweep_around`"""


def names() -> list[str]:
    """The sample: names evenly spread over those that the sweep of all hosts found to work, up to a size."""
    chosen = []
    for library, (rows, count) in SAMPLES.items():
        found = read_results(Path(rows))
        small = sorted(name for name, row in found.items() if row["ok"] and row["params"] <= LARGEST)
        chosen += [f"{library}:{small[i * len(small) // count]}" for i in range(count)]
    return chosen


def check(name: str) -> dict[str, Any]:
    """Build one host with random weights and run the whole check on it."""
    library, _, reference = name.partition(":")
    with stage("build"):
        inputs: Any
        if library == "timm":
            size = choose_size(reference, build_empty(reference), (3, 1, 1))
            torch.manual_seed(0)
            model = timm.create_model(reference, **size.arguments)
            inputs, example = (torch.randn(count, 3, size.size, size.size) for count in (2, 1))
        else:
            model, inputs, _ = sweep_transformers.build(*reference.split("/"))
            example = inputs
    with stage("points"):
        host = host_from_module(model, example=example)
    return check_around(host, inputs)


def check_around(host: ModuleHost, inputs: Any) -> dict[str, Any]:
    """A seed around every layer that offers a point: output to the bit, gradients, plain model, merge and back.

    Returns:
        Number of points by kind of layer, of seeds merged with the reasons of the others, and differences.
    """
    wake(host.module)
    host.module.requires_grad_(False).eval()
    with stage("identity"), torch.no_grad():
        bare = _seeded(host, inputs)
        points = resolve_points(host, [f"around:{name}" for name in host_points(host)])
        plane = Plane(host, ready_registry(), points=points)
        _same(bare, _seeded(host, inputs), "dormant slots change the output")
    with stage("birth"), torch.no_grad():
        for path, slot in plane.slots.items():
            assert slot.spec.layer is not None
            options = {"rank": min(2, slot.spec.layer.outputs)}
            plane.germinate(path, BLUEPRINTS[slot.spec.layer.kind], tempo=Tempo.INSTANT, options=options)
        _same(bare, _seeded(host, inputs), "seeds at alpha 1 change the output at birth")
    with stage("training"):
        groups = plane.seed_groups()
        host.module.train()
        loss = _loss(host.forward_with_slots(wider(inputs)))
        loss.backward()
        taught = sum(any(p.grad is not None and bool(p.grad.any()) for p in group) for group in groups.values())
        if not taught:
            raise AssertionError("no seed has a gradient")
    with stage("merge"), torch.no_grad():
        host.module.eval()
        generator = torch.Generator().manual_seed(0)
        for group in groups.values():
            for parameter in group:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_((0.02 * noise).to(parameter.dtype))
        grown = _seeded(host, inputs)
        scale = float(grown.abs().max().clamp_min(1.0))
        moved = float((grown - bare).abs().max()) / scale
        plain = compose(plane).eval()
        torch.manual_seed(0)
        composed = float((plain(inputs) - grown).abs().max()) / scale
        del plain
        done, left = merge_all(plane, permanent=False)
        difference = float((_seeded(host, inputs) - grown).abs().max()) / scale
        for path in done:
            plane.unmerge(path)
        back = float((_seeded(host, inputs) - grown).abs().max()) / scale
        if not moved > 10 * max(difference, back):
            raise AssertionError(f"the seeds move the output by {moved:.2g} only, and the merge by {difference:.2g}")
        if max(composed, difference, back) > LIMIT:
            raise AssertionError(f"plain {composed:.2g}, merged {difference:.2g}, taken out {back:.2g}")
    kinds = Counter(slot.spec.layer.kind for slot in plane.slots.values() if slot.spec.layer is not None)
    return {
        "points": len(plane.slots), "kinds": dict(sorted(kinds.items())), "taught": taught, "moved": moved,
        "composed": composed, "merged": len(done), "merge": difference, "back": back,
        "unmerged": dict(Counter(reason.partition("cannot be merged: ")[2] for reason in left.values())),
        "params": sum(p.numel() for p in host.module.parameters()),
    }  # fmt: skip


def host_points(host: ModuleHost) -> list[str]:
    """Paths of the layers around which whole slots can stand."""
    return [name.removeprefix("around:") for name in host.around_specs() if "@" not in name]


def wider(inputs: Any) -> Any:
    """More pictures than two, over which batch norms of one position give no gradient."""
    return torch.randn(8, *inputs.shape[1:]) if isinstance(inputs, Tensor) else inputs


def page(results: dict[str, dict[str, Any]], every: list[str]) -> str:
    """The results as Markdown."""
    good = {name: row for name, row in results.items() if row["ok"]}
    versions = f"timm {timm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    counts = " and ".join(f"{count} of {library}" for library, (_, count) in SAMPLES.items())
    lines = ["# Sweep of slots around layers", "", TEXT.format(counts=counts, versions=versions), ""]
    lines += [
        f"**{len(good)} of {len(results)} work**, of {len(every)} in the sample.", "",
        "| host | points | kinds | seeds move logits by | merged | merged differs by | taken out differs by |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name in every:
        row = results.get(name)
        if row is None:
            lines.append(f"| {name} | not checked | | | | | |")
        elif not row["ok"]:
            why = " ".join(str(row["error"]).replace("|", "\\|").split())[:160]
            lines.append(f"| {name} | **fails** at {row['stage']} | {why} | | | | |")
        else:
            kinds = ", ".join(f"{count} {kind}" for kind, count in row["kinds"].items())
            lines.append(
                f"| {name} | {row['points']} | {kinds} | {row['moved']:.1e} | {row['merged']} | {row['merge']:.0e} | "
                f"{row['back']:.0e} |"
            )
    reasons = Counter[str]()
    for row in good.values():
        for reason, count in row["unmerged"].items():
            reasons[reason.partition(";")[0].partition(", by ")[0].partition(": ")[0]] += count
    if reasons:
        told = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
        lines += ["", f"Not merged, and told why: {told}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Sweep and write the page."""
    parser = arguments(__doc__.splitlines()[0], ROWS, PAGE)
    parser.set_defaults(memory=6, timeout=600)
    options = parser.parse_args()
    every = names()
    quiet_forever()
    ready_registry()
    fast_initialisation()
    results = sweep(every, check, options)
    if options.table != "-":
        Path(options.table).write_text(page(results, every))
    return 0


if __name__ == "__main__":
    sys.exit(main())
