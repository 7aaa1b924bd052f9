"""Formulas of `benchmarks/at_scale.py` against what small models do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.at_scale import (
    CASES,
    Cluster,
    Model,
    activations,
    checkpoint,
    decision,
    exchange,
    figures,
    limits,
    memory,
    memory_to_build,
    report,
    snapshot,
    step,
)
from benchmarks.several_gpus.rates import rates_of
from esper_core.testing.cases import installed
from esper_core.tolaria import process_group
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.optimizer import GrowthOptimizer
from esper_core.tolaria.process_group import PORTION
from esper_core.tolaria.snapshot import Snapshot
from esper_hosts.gpt import Block

RATES = {
    "all_gather": 300e9, "reduce_scatter": 250e9, "copy_on_device": 2.5e12, "copy_to_cpu": 5e9, "sha256": 1.5e9,
    "mfu_kept": 0.6, "mfu_recomputed": 0.45, "seconds_to_copy_a_block": 0.05,
}  # fmt: skip
"""Round numbers: what is tested are the formulas."""


@pytest.mark.parametrize(("width", "length", "rows"), [(256, 64, 2), (512, 32, 3)])
def test_activations_are_what_autograd_keeps(width: int, length: int, rows: int) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        block = Block(width, width // 128, length, 4, 4.0, False)
    finally:
        torch.set_default_dtype(torch.float32)
    own = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *block.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(rows, length, width, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        block(x)
    found = sum(storage.nbytes() for storage in kept.values())
    assert found == pytest.approx(activations(width, length, rows), rel=0.01)


def test_state_and_snapshot_are_what_optimizer_and_governor_hold() -> None:
    options = {"layers": 3, "width": 32}
    host = installed().build("host", "gpt", outputs=50, input_shape=(16,), seed=0, options=options)
    model = Model("small", 3, 32, vocabulary=50, length=16)
    assert model.parameters == sum(p.numel() for p in host.module.parameters())
    from esper_core.kasmina.plane import Plane

    plane = Plane(host, installed(), blueprints=["copy"])
    optimizer = GrowthOptimizer(host.module.parameters(), RunConfig())
    optimizer.follow(plane)
    host.forward_with_slots(torch.zeros(2, 16, dtype=torch.int64)).sum().backward()
    optimizer.step(1e-3)
    big = [t for t in optimizer.named_state().values() if t.numel() > 1]
    state = sum(t.nbytes for t in (*big, *host.module.parameters(), *(p.grad for p in host.module.parameters())))
    one = Cluster(gpus=1, rows=2)
    assert state == memory(model, one)["state"]
    kept = Snapshot()
    kept.take(plane, optimizer, 1)
    held = {name: t for name, t in kept.tensors.items() if t.numel() > 1 and not name.startswith("random")}
    buffers = sum(t.nbytes for name, t in held.items() if name.endswith((".cos", ".sin")))
    assert sum(t.nbytes for t in held.values()) - buffers == memory(model, one)["snapshot"]


def test_more_gpus_hold_less_each_and_exchange_no_faster() -> None:
    model = CASES[0][0]
    few, many = Cluster(gpus=64, rows=2), Cluster(gpus=128, rows=2)
    assert memory(model, many)["state"] == memory(model, few)["state"] / 2
    assert snapshot(model, many, RATES) == snapshot(model, few, RATES) / 2
    assert exchange(1e9, many, RATES, "all_gather") > exchange(1e9, few, RATES, "all_gather")
    assert figures(many) > figures(few) > figures(Cluster(gpus=1, rows=1)) == 0
    assert checkpoint(model, many, RATES)["bytes"] == checkpoint(model, few, RATES)["bytes"] == 24 * model.parameters
    assert memory_to_build(model) == 4 * model.parameters + PORTION  # whatever the number of GPUs


def test_a_slow_network_shows_in_the_step_and_a_fast_one_is_hidden() -> None:
    model = CASES[0][0]
    fast, slow = Cluster(gpus=64, rows=2), Cluster(gpus=64, rows=2, network=2e9)
    quick, late = step(model, fast, RATES), step(model, slow, RATES)
    assert quick["computing"] == late["computing"] and quick["seconds"] < late["seconds"]
    assert late["not hidden"] > late["computing"] > quick["not hidden"]
    assert step(model, fast, RATES, deepened=True)["computing"] > 1.9 * quick["computing"]


def test_a_decision_costs_a_share_of_the_passes_it_reads() -> None:
    model = CASES[0][0]
    one = Cluster(gpus=8, rows=2)
    least = decision(model, one, RATES, examples=1, readings=1)
    assert least == decision(model, one, RATES, examples=16, readings=1)  # never less than one batch of all
    assert decision(model, one, RATES, examples=160, readings=2) == pytest.approx(20 * least, rel=0.05)
    assert least < step(model, one, RATES)["seconds"] / 3


def test_what_breaks_comes_first() -> None:
    for model, cluster in CASES:
        rows = limits(model, cluster, RATES)
        ratios = [row["ratio"] for row in rows]
        assert ratios == sorted(ratios, reverse=True)
        assert all(row["used"] >= 0 and row["limit"] > 0 for row in rows)
    pieces = {row["piece"]: row["ratio"] for row in limits(*CASES[1], RATES)}
    assert pieces["building: the whole model on every GPU"] > 1 > pieces["snapshot memory"]


def test_a_module_is_placed_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "PORTION", 100)
    tensors = [torch.zeros(size) for size in (5, 30, 1, 1, 24, 3)]
    found = [[len(t) for t in portion] for portion in process_group._in_portions(tensors)]
    assert found == [[5, 30], [1, 1, 24], [3]]
    assert list(process_group._in_portions([])) == []


def test_rates_are_drawn_from_what_the_pieces_told() -> None:
    links: list[dict[str, object]] = [
        {"stage": "machine", "device": "a GPU"},
        {"stage": "exchanges", "bus_bytes_a_second": {"all_gather_bfloat16": 3e11, "reduce_scatter_float32": 2e11}},
        {"stage": "copies", "a_second": {"copy_on_device": 1e12, "copy_to_cpu": 5e9, "sha256": 2e9}},
        {"stage": "block", "width": 4096.0, "mfu": 0.6, "mfu_recomputed": 0.45},
        {"stage": "block", "width": 8192.0, "mfu": 0.62, "mfu_recomputed": 0.46},
    ]
    told = [(9.0, False), (0.5, False), (0.7, False), (3.0, True), (5.0, False)]
    billion = [
        {"stage": "training", "decision_seconds": seconds, "deepened": deepened, "layers": 12}
        for seconds, deepened in told
    ]
    found = rates_of(links, [{"stage": "ready"}, *billion])
    assert found["rates"]["seconds_to_copy_a_block"] == pytest.approx((3.0 - 0.6) / 12)
    assert found["rates"]["copy_on_device"] == 2e12  # read and written
    assert [case["model"] for case in report(found)] == ["7B", "70B"]
    assert rates_of(links, [])["rates"]["seconds_to_copy_a_block"] is None


def test_memory_is_what_was_measured() -> None:
    """Peak of a GPT of 24 blocks of 2,048 on two GPUs in which every block recomputes."""
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "several-gpus.json"
    rows = json.loads(file.read_text())["billion"]
    measured = next(row for row in rows if row["stage"] == "recomputed" and row["blocks"] == "blocks")
    found = memory(Model("1.2B", 24, 2048, vocabulary=256, length=1024), Cluster(gpus=2, rows=32))
    assert sum(found.values()) / 2**30 == pytest.approx(measured["peak_GiB"], rel=0.05)
