"""What growth costs on many GPUs, and what breaks first: 7B on 64 and 70B on 1,024, by formulas over measured rates.

Run: python -m benchmarks.at_scale [--rates FILE.json] [--json FILE]
Parameters are counted on the meta device; activations by a formula that `tests/distributed/test_at_scale.py` holds
against what autograd keeps. Rates are those of FILE, drawn from what was measured by `benchmarks.several_gpus.rates`;
those of a network that was not at hand are named in `Cluster`. Formulas follow what Esper does today.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch

from esper_core.tolaria.process_group import PORTION
from esper_hosts.gpt import GPT

RATES: Final = Path(__file__).parent / "results" / "several-gpus-rates.json"
PEAK: Final = 989e12
"""Dense bf16 FLOP/s of an H100 (SXM), from NVIDIA's data sheet."""

STATE: Final = 4 + 4 + 8
"""Bytes of a parameter in training: value, gradient, two moments of AdamW, all float32."""

EXCHANGES_OF_A_DECISION: Final = 8
"""Gathers, sums and broadcasts of figures at a decision: 6 to 8 counted in runs of two processes, births included."""

SNAPSHOT: Final = 4 + 8
"""Bytes of a parameter in the governor's snapshot: value and moments."""


@attrs.frozen
class Model:
    """A GPT of `esper_hosts.gpt`, with an untied head."""

    name: str
    layers: int
    width: int
    vocabulary: int = 32_000
    length: int = 4096

    @property
    def block(self) -> int:
        """Parameters of one block."""
        return _count(self.width, self.length)[0]

    @property
    def root(self) -> int:
        """Parameters of embedding, head and last norm."""
        return (2 * self.vocabulary + 1) * self.width

    @property
    def parameters(self) -> int:
        """Of all."""
        return self.layers * self.block + self.root


def _count(width: int, length: int) -> tuple[int, int]:
    """Parameters of one block, and of a whole model of one block and one token, counted on the meta device."""
    with torch.device("meta"):
        model = GPT(1, 1, width, max(1, width // 128), length, 4.0, False)
    return sum(p.numel() for p in model.blocks[0].parameters()), sum(p.numel() for p in model.parameters())


@attrs.frozen
class Cluster:
    """Machines of eight H100. Rates are bytes a second unless named otherwise; `rows`: of each GPU in a step.

    Attributes:
        network: of one GPU to other machines: a 400 Gb/s adapter for each, by NVIDIA's DGX H100 data sheet.
        hop: seconds of one hop of a ring of NCCL, and `hop_figures` of one over TCP between CPUs: assumptions.
        disk: of one process to a shared file system: an assumption.
        host_memory: of one machine: 2 TB, as a DGX H100 has.
    """

    gpus: int
    rows: int
    memory: float = 80e9
    reserve: float = 4e9
    per_machine: int = 8
    network: float = 50e9
    hop: float = 5e-6
    hop_figures: float = 50e-6
    disk: float = 2e9
    host_memory: float = 2e12


# --- Memory ---


def activations(width: int, length: int, rows: int) -> float:
    """Bytes that autograd keeps of one block in bf16, not compiled: 36 a token and unit of width.

    Inputs of both norms and of attention's projection (2 each), of `qkv` and `up` (2 each), rotated queries and keys
    (4), queries, keys and values (6), inputs of GELU and of `down` (8 each). Statistics of norms and of attention are
    left out: they are 1/width of the rest, or 1/size of a head.
    """
    return float(36 * width * length * rows)


def memory(model: Model, cluster: Cluster, deepened: bool = False) -> dict[str, float]:
    """Bytes on one GPU in a step with every block recomputed, by use."""
    layers = model.layers * (2 if deepened else 1)
    parameters = layers * model.block + model.root
    tokens = cluster.rows * model.length
    return {
        "state": STATE * parameters / cluster.gpus,
        "snapshot": SNAPSHOT * parameters / cluster.gpus,
        "gathered": 2 * 2 * model.block + 2 * model.root,  # this block and the next in bf16, and the root
        "gradients on the way": (2 + 4) * max(model.block, model.root),
        "inputs of blocks": 2 * layers * model.width * tokens,
        "one block": activations(model.width, model.length, cluster.rows),
        "logits": (2 + 4 + 4) * model.vocabulary * tokens,
    }


def memory_to_build(model: Model) -> float:
    """Bytes on one GPU before anything is sharded: the whole model in float32, and what is broadcast at once."""
    return 4.0 * model.parameters + PORTION


# --- Time ---


def exchange(count: float, cluster: Cluster, rates: Mapping[str, float], kind: str) -> float:
    """Seconds of an all-gather or reduce-scatter in a ring over all GPUs of tensors of `count` bytes in all."""
    inside = rates[kind]
    bandwidth = inside if cluster.gpus <= cluster.per_machine else min(inside, cluster.per_machine * cluster.network)
    return count * (cluster.gpus - 1) / cluster.gpus / bandwidth + (cluster.gpus - 1) * cluster.hop


def figures(cluster: Cluster, exchanges: float = 1.0) -> float:
    """Seconds of exchanges of figures between CPUs, which go round all processes in a ring."""
    return exchanges * (cluster.gpus - 1) * cluster.hop_figures


def block_flops(model: Model, cluster: Cluster) -> float:
    """Training FLOPs of one block on one GPU, without recomputation; see `several_gpus.shared.model_flops`."""
    tokens = cluster.rows * model.length
    return (6.0 * model.block + 6.0 * model.width * model.length) * tokens


def step(model: Model, cluster: Cluster, rates: Mapping[str, float], deepened: bool = False) -> dict[str, float]:
    """Seconds of one step with every block recomputed: computing, exchanges, and what of these is not hidden."""
    layers = model.layers * (2 if deepened else 1)
    computing = block_flops(model, cluster) / (rates["mfu_recomputed"] * PEAK)
    gather = exchange(2.0 * model.block, cluster, rates, "all_gather")
    scatter = exchange(4.0 * model.block, cluster, rates, "reduce_scatter")
    forward, backward = computing / 4, computing * 3 / 4  # four parts: forward, again, and twice that backward
    exposed = max(0.0, gather - forward) + max(0.0, gather + scatter - backward)
    tokens = cluster.rows * model.length
    head = 6.0 * model.vocabulary * model.width * tokens / (rates["mfu_kept"] * PEAK)
    root = exchange(2.0 * model.root, cluster, rates, "all_gather") * 2
    root += exchange(4.0 * model.root, cluster, rates, "reduce_scatter")
    parameters = layers * model.block + model.root
    update = (STATE + 12) * parameters / cluster.gpus / rates["copy_on_device"]
    meeting = figures(cluster)  # by the CPU, while the GPU computes
    seconds = max(layers * (computing + exposed) + head + root + update, meeting)
    return {
        "computing": layers * computing + head, "exchanges": layers * (2 * gather + scatter) + root,
        "not hidden": layers * exposed + root, "update": update, "figures": meeting, "seconds": seconds,
    }  # fmt: skip


def decision(
    model: Model, cluster: Cluster, rates: Mapping[str, float], *, examples: int = 2048, readings: int = 2
) -> float:
    """Seconds of one decision: the validation examples once for each of `readings` masks of slots, and its figures.

    Examples are read in whole batches of all processes: at least one.
    """
    batches = max(1.0, examples / (cluster.rows * cluster.gpus))
    forward = block_flops(model, cluster) / 3 / (rates["mfu_kept"] * PEAK)
    gather = exchange(2.0 * model.block, cluster, rates, "all_gather")
    head = 2.0 * model.vocabulary * model.width * cluster.rows * model.length / (rates["mfu_kept"] * PEAK)
    passes = batches * readings * (model.layers * max(forward, gather) + head)
    return passes + figures(cluster, EXCHANGES_OF_A_DECISION)


def deepening(model: Model, cluster: Cluster, rates: Mapping[str, float]) -> float:
    """Seconds of a deepening that copies every block: Python's work for each, the copies, and two passes of one row."""
    copied = 2.0 * SNAPSHOT * model.layers * model.block / cluster.gpus / rates["copy_on_device"]
    gather = exchange(2.0 * model.block, cluster, rates, "all_gather")
    return model.layers * (rates["seconds_to_copy_a_block"] + 3 * gather) + copied


def snapshot(model: Model, cluster: Cluster, rates: Mapping[str, float]) -> float:
    """Seconds of one snapshot: every GPU copies its own shards."""
    return 2.0 * SNAPSHOT * model.parameters / cluster.gpus / rates["copy_on_device"]


def checkpoint(model: Model, cluster: Cluster, rates: Mapping[str, float]) -> dict[str, float]:
    """One checkpoint, which the first process gathers and writes: bytes, and seconds. The snapshot is in it."""
    size = 2.0 * SNAPSHOT * model.parameters
    gathering = exchange(size, cluster, rates, "all_gather") + size / rates["copy_to_cpu"]
    writing = size / cluster.disk + size / rates["sha256"]
    return {"bytes": size, "seconds to gather": gathering, "seconds to write": writing}


def checkpoint_sharded(model: Model, cluster: Cluster, rates: Mapping[str, float]) -> float:
    """Seconds of the same where every process would write its own shards; Esper does not do this."""
    size = 2.0 * SNAPSHOT * model.parameters / cluster.gpus
    return size / rates["copy_to_cpu"] + size / cluster.disk * min(cluster.gpus, 50) + size / rates["sha256"]


# --- What breaks first ---


def limits(model: Model, cluster: Cluster, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """How far each piece is from what ends or spoils a run, nearest first: `used` over `limit` above 1 breaks."""
    room = cluster.memory - cluster.reserve
    seconds = step(model, cluster, rates)["seconds"]
    saved = checkpoint(model, cluster, rates)
    rows = [
        ("building: the whole model on every GPU", memory_to_build(model), room, "bytes of a GPU"),
        ("building: the whole model in every process", 4.0 * model.parameters * cluster.per_machine,
         cluster.host_memory, "bytes of a machine"),
        ("training", sum(memory(model, cluster).values()), room, "bytes of a GPU"),
        ("training, deepened", sum(memory(model, cluster, deepened=True).values()), room, "bytes of a GPU"),
        ("snapshot memory", memory(model, cluster)["snapshot"], room, "bytes of a GPU"),
        ("checkpoint memory: all of it in the first process", saved["bytes"], cluster.host_memory,
         "bytes of a machine"),
        ("checkpoint time", saved["seconds to gather"] + saved["seconds to write"], 300.0, "seconds, of 5 minutes"),
        ("a decision each 500 steps", decision(model, cluster, rates), 0.02 * 500 * seconds, "seconds, of 2%"),
        ("a snapshot each 100 steps", snapshot(model, cluster, rates), 0.01 * 100 * seconds, "seconds, of 1%"),
        ("deepening", deepening(model, cluster, rates), 30.0, "seconds, of 30"),
        ("figures of a step", figures(cluster), seconds, "seconds of a step"),
    ]  # fmt: skip
    told = [{"piece": piece, "used": used, "limit": limit, "ratio": used / limit, "unit": unit}
            for piece, used, limit, unit in rows]  # fmt: skip
    return sorted(told, key=lambda row: -float(row["ratio"]))


CASES: Final = (
    (Model("7B", 32, 4096), Cluster(gpus=64, rows=2)),
    (Model("70B", 86, 8192), Cluster(gpus=1024, rows=1)),
)


def report(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Everything about every case. `measured`: `rates`, and `blocks` with the shares of the peak by width."""
    found = []
    for model, cluster in CASES:
        rates = {**measured["rates"], **measured["blocks"][str(model.width)]}
        parts = step(model, cluster, rates)
        flops = model.layers * block_flops(model, cluster)
        flops += 6.0 * model.vocabulary * model.width * cluster.rows * model.length
        found.append({
            "model": model.name, "parameters": model.parameters, "gpus": cluster.gpus,
            "tokens_a_step": cluster.gpus * cluster.rows * model.length,
            "memory_GB": {name: value / 1e9 for name, value in memory(model, cluster).items()},
            "memory_to_build_GB": memory_to_build(model) / 1e9,
            "step": parts, "mfu": flops / parts["seconds"] / PEAK,
            "decision_seconds": decision(model, cluster, rates), "snapshot_seconds": snapshot(model, cluster, rates),
            "deepening_seconds": deepening(model, cluster, rates), "checkpoint": checkpoint(model, cluster, rates),
            "checkpoint_sharded_seconds": checkpoint_sharded(model, cluster, rates),
            "limits": limits(model, cluster, rates),
        })  # fmt: skip
    return found


def main() -> None:
    """Print all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=Path, default=RATES)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    found = report(json.loads(asked.rates.read_text()))
    for case in found:
        print(f"\n{case['model']}: {case['parameters'] / 1e9:.2f}B parameters on {case['gpus']} GPUs, "
              f"{case['step']['seconds']:.2f} s a step of {case['tokens_a_step'] / 1e6:.2f}M tokens, "
              f"MFU {case['mfu']:.0%}")  # fmt: skip
        print("| piece | used | limit | share | |\n|---|---:|---:|---:|---|")
        for row in case["limits"]:
            print(f"| {row['piece']} | {row['used']:.3g} | {row['limit']:.3g} | {row['ratio']:.2f} | {row['unit']} |")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
