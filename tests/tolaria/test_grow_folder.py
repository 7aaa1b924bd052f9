"""`grow` with a folder: events, report, going on after an interruption; and how its result shows itself."""

from __future__ import annotations

import io
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esper_core.leyline.errors import BadOption
from esper_core.leyline.events import Event
from esper_core.tolaria.grow import grow
from esper_core.tolaria.grown import Grown
from esper_core.tolaria.model_file import load_model
from esper_core.tolaria.progress import Lines


def grown(**options: Any) -> Grown:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    inputs = torch.randn(48, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(inputs, torch.arange(48) % 3), batch_size=8)
    return grow(net, loader, loader, **{"blueprints": "conv", "epochs": 3, "lr": 0.01, "budget_params": "", **options})


class Stop:
    """A sink that raises the signal by which a run is asked to stop."""

    inline = True

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def write(self, event: Event) -> None:
        if event.kind == "epoch_ended" and getattr(event, "epoch", -1) == self.epoch:
            import signal

            signal.raise_signal(signal.SIGTERM)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_name_alone_is_one_blueprint_and_a_folder_holds_events_and_report(tmp_path: Path) -> None:
    found = grown(out=str(tmp_path / "run"))
    assert list(found.plane.candidates) == ["conv"] and found.result.folder == tmp_path / "run"
    assert [e["kind"] for e in lines(tmp_path / "run")][-1] == "run_ended"
    assert "Esper report" in (tmp_path / "run" / "report.html").read_text()
    assert found.report(tmp_path / "again.html").is_file()
    with pytest.raises(BadOption, match="complete"):
        grown(out=str(tmp_path / "run"))
    with pytest.raises(BadOption, match="a module of your own"):
        load_model(tmp_path / "run")


def test_the_same_call_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = grown(out=str(tmp_path / "whole"), checkpoint_every=1)
    told = {"out": str(tmp_path / "cut"), "checkpoint_every": 1}
    assert grown(**told, sinks={"stop": Stop(1)}).result.status == "interrupted"
    with pytest.raises(BadOption, match="other options"):
        grown(**told, epochs=4)
    again = grown(**told)
    assert again.result.status == "finished"
    assert again.result.validation_loss == whole.result.validation_loss
    for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [e["step"] for e in lines(tmp_path / "cut")] == [e["step"] for e in lines(tmp_path / "whole")]


def test_a_result_shows_itself_and_says_where_its_report_would_be() -> None:
    found = grown()
    assert "validation accuracy" in found.summary() and "parameters" in str(found)
    assert found._repr_html_().count("<tr>") == len(found.rows())
    with pytest.raises(BadOption, match="no folder"):
        found.report()


def test_a_summary_names_the_missing_control_and_the_seeds_that_are_undecided(tmp_path: Path) -> None:
    found = grown(out=str(tmp_path / "run"))
    assert 'controller="wait"' in found.rows()["control"]
    assert "control" not in grown(controller="wait", epochs=1).rows()
    log = tmp_path / "run" / "events.jsonl"
    changed = [event for event in lines(tmp_path / "run") if event["kind"] == "stage_changed"][-1]
    slot = changed["slot"]
    plane = SimpleNamespace(growths={slot: SimpleNamespace(blueprint="conv")})
    for low, told in ((0.01, f"{slot} (conv, undecided)"), (0.03, f"{slot} (conv)")):
        decided = {**changed, "after": "fossilized", "gain": 0.04, "gain_low": low, "gain_high": 0.07, "rent": 0.02}
        with log.open("a") as file:
            file.write(json.dumps(decided) + "\n")
        kept = attrs.evolve(found, plane=plane, result=attrs.evolve(found.result, fossilized=(slot,)))
        assert kept.rows()["fossilized"] == told
        assert kept.rows()[f"seed {slot}"] == f"gain +0.04 [{low:+.3g}, +0.07] nats against a rent of 0.02"


def test_a_validation_split_by_which_no_seed_can_be_judged_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="validation split has 48 examples"):
        grown(epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        grown(epochs=1, controller="wait")


def test_progress_is_a_line_an_epoch() -> None:
    stream = io.StringIO()
    grown(sinks={"lines": Lines(stream)}, progress=False)
    assert sum("epoch" in line and "validation" in line for line in stream.getvalue().splitlines()) == 3


def test_a_budget_without_room_is_told_with_one_that_has_room() -> None:
    with pytest.raises(BadOption, match="no room") as caught:
        grown(budget_params="100%")
    (share,) = re.findall(r"budget_params='(\d+%)'", str(caught.value))
    assert grown(budget_params=share, epochs=1).result.status == "finished"
