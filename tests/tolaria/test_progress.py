"""What `grow` shows and what it takes: progress by where it runs, names of sinks, words of other libraries."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from esper_core.leyline.errors import BadOption, EsperError
from esper_core.tolaria.grow import accompany
from esper_core.tolaria.progress import watchers
from tests.tolaria.test_grow_folder import grown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 32}, r"DataLoader\(…, batch_size=32\)"),
        ({"host": "cnn"}, "no effect.*esper run --host"),
        ({"budget_total": "1e9"}, "no effect.*epochs="),
        ({"minutes": 2}, "no effect.*epochs="),
        ({"download": True}, "no effect"),
        ({"max_epochs": 3}, "did you mean epochs"),
        ({"criterion": "regression"}, "did you mean loss="),
        ({"momentum": 0.9}, "optimizer.momentum"),
        ({"sinks": "tensorboard"}, 'out="runs/NAME"'),
        ({"sinks": ["tensorbord"], "out": "OUT"}, "did you mean tensorboard"),
        ({"progress": "bar"}, "lines"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused_with_the_word_that_is_meant(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    if options.get("out"):
        options = {**options, "out": str(tmp_path / "run")}
    with pytest.raises(EsperError, match=said):
        grown(**options)
    assert not (tmp_path / "run").exists()


def test_in_a_loop_of_ones_own_the_options_of_the_loop_are_the_callers() -> None:
    net = torch.nn.Linear(2, 2)
    for option in ({"epochs": 3}, {"out": "runs/x"}, {"lr_schedule": 1}):
        with pytest.raises(BadOption, match=r"steps=|emit=|unknown option"):
            accompany(net, torch.optim.SGD(net.parameters(), 0.1), (torch.zeros(2, 2),), steps=4, **option)


def test_sinks_by_name_write_into_the_folder(tmp_path: Path) -> None:
    found = grown(out=str(tmp_path / "run"), sinks="tensorboard", epochs=1, bs=8)
    assert found.result.status == "finished" and list((tmp_path / "run" / "tensorboard").iterdir())


class Display:
    """What a notebook's `IPython.display` is asked to show."""

    def __init__(self) -> None:
        self.pictures: list[str] = []

    def HTML(self, text: str) -> str:
        return text

    def display(self, text: str, display_id: bool) -> Display:
        assert display_id
        self.update(text)
        return self

    def update(self, text: str) -> None:
        self.pictures.append(text)


def test_a_notebook_sees_html_and_a_pipe_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grown(epochs=1).result.status == "finished"
    assert capsys.readouterr() == ("", ""), "nothing is printed where nobody looks"
    shown = Display()
    kernel = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel, display=shown))
    found = grown()
    first, last = shown.pictures[0], shown.pictures[-1]
    assert "epoch 0/3" in first and "epoch 3/3" in last and "finished" in last and "accuracy" in last
    assert not re.search(r"<script|https?://", last)
    for text in (*shown.pictures, found._repr_html_()):
        ElementTree.fromstring(f"<div>{text.replace('&nbsp;', ' ')}</div>")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_the_live_view(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLORTERM", "truecolor")  # rich keeps the first codes of a style for all consoles
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert list(watchers(None, 3, "Net")) == ["live"] and list(watchers("lines", 3, "Net")) == ["lines"]
    assert watchers(False, 3, "Net") == {}
    grown()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "Sequential" in text and "epoch 3/3" in text and "model on loaders" not in text


def test_the_plot_has_a_point_for_each_epoch_and_a_mark_for_each_birth(tmp_path: Path) -> None:
    found = grown()
    births = [e for e in found.events if e.kind == "stage_changed" and e.to_dict()["after"] == "germinated"]
    path = found.plot().save(tmp_path / "curves.svg")
    tree = ElementTree.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert len(list(tree.iter(f"{space}circle"))) == 2 * 3
    titles = [title.text or "" for title in tree.iter(f"{space}title")]
    assert births and sum("germinated" in title for title in titles) == 2 * len(births)


def test_a_mapping_of_sinks_is_still_the_callers(tmp_path: Path) -> None:
    class Count:
        inline, seen = True, 0

        def write(self, event: object) -> None:
            self.seen += 1

        def flush(self) -> None: ...

        def close(self) -> None: ...

    mine: Mapping[str, Any] = {"count": Count()}
    assert len(grown(epochs=1, sinks=mine).events) == mine["count"].seen
