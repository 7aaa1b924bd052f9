"""`esper hosts show`: what a person sees, what a program reads, what is refused."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from esper_core.cli.main import cli

TINY_GPT2 = ("transformers:gpt2", "--set", "transformers.layers=1", "--set", "transformers.width=16")


def show(*arguments: str, columns: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(cli, ["hosts", "show", *arguments], prog_name="esper")


def test_the_constitutions_network() -> None:
    data = json.loads(show("cnn", "--json").stdout)
    assert [(p["name"], p["channels"], p["layout"], p["stride"]) for p in data["points"]] == [
        ("block1", 32, "NCHW", 2), ("block2", 64, "NCHW", 4), ("block3", 128, "NCHW", 8),
    ]  # fmt: skip
    block2 = data["points"][1]
    assert block2["params"] == 32 * 64 * 9 + 2 * 64
    assert block2["flops"] == 2 * 32 * 64 * 9 * 16 * 16, "16×16 positions before the pooling, a multiply-add is two"
    assert data["flops"] == sum(p["flops"] for p in data["points"]) + 2 * 128 * 10


def test_a_table_fits_eighty_columns() -> None:
    result = show("cnn")
    assert result.exit_code == 0 and all(len(line.rstrip()) <= 80 for line in result.output.splitlines())
    heads, first = result.output.splitlines()[1:3]
    assert heads.split() == ["point", "layout", "size", "channels", "after", "params", "FLOPs", "tags"]
    assert first.split() == ["block1", "NCHW", "16×16", "32", "block", "928", "1.77M", "spatial"]
    assert "region" in show("cnn", columns=120).output


def test_a_transformer_tells_its_roles_and_that_its_weights_are_random() -> None:
    data = json.loads(show(*TINY_GPT2, "--json").stdout)
    assert [p["role"] for p in data["points"]] == ["after_attention", "after_ffn", "block"]
    assert all(p["tags"] == ["causal", "sequence"] and p["channels"] == 16 for p in data["points"])
    assert "random weights" in data["notes"][0]
    assert "note: gpt2 has random weights" in show(*TINY_GPT2).output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("timm:resnet19",), "did you mean resnet18?"),
        (("transformers:gtp2",), "did you mean gpt2"),
        (("transformers:/nowhere",), "a folder with config.json"),
        (("nope",), "there is no host 'nope'"),
        (("cnn:16,32",), "--set cnn.widths=16,32"),
        (("cnn", "--set", "cnn.widths=a"), "positive whole numbers"),
        (("cnn", "--set", "cnn.pool=maximum"), "one of max, average, stride, none"),
        (("cnn", "--set", "cnn.pool=none,max"), "or 3 of them with commas"),
        (("cnn", "--set", "timm.img_size=3"), "no option of the host cnn"),
        (("cnn", "--input-shape", "3,x"), "--input-shape 3,32,32"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_one_line(arguments: tuple[str, ...], says: str) -> None:
    result = show(*arguments)
    error = str(result.exception) if result.exception and not result.output else result.output
    assert result.exit_code != 0 and says in error and "\n" not in error.strip()
