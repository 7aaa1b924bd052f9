"""The output of `esper tamiyo`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from esper_core.cli.output import make_console, make_table, say
from esper_core.nissa.live import bar, clock, sparkline
from esper_core.nissa.report.wording import printable, quantity

if TYPE_CHECKING:
    from esper_core.simic.learning.training import Training

Record = Mapping[str, Any]


class TrainingView:
    """Shows a training: live on a terminal, a line an iteration otherwise; use it as a context."""

    def __init__(self, training: Training, *, quiet: bool = False, json_lines: bool = False) -> None:
        self.training, self.json_lines = training, json_lines
        self.console = make_console()
        live = not (quiet or json_lines) and self.console.is_terminal and not self.console.is_dumb_terminal
        self.lines = not (quiet or json_lines or live)
        self._live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop") if live else None
        if self._live is not None:
            self._live.start()
            self._live.update(render_training(training, self.console.width), refresh=True)
        elif self.lines:
            say(f"training in {training.path}, {training.done} of {training.iterations} iterations done")

    def take(self, record: Record) -> None:
        """Show one more iteration."""
        if self.json_lines:
            say(json.dumps(record))
        elif self._live is not None:
            self._live.update(render_training(self.training, self.console.width), refresh=True)
        elif self.lines:
            say(iteration_line(record, self.training.iterations))

    def close(self) -> None:
        """Restore the terminal. May be called again."""
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> TrainingView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def iteration_line(record: Record, iterations: int) -> str:
    """One iteration on one line."""
    update, seconds = record["update"], record["seconds"]
    words = [
        f"{record['iteration'] + 1:>4}/{iterations} {record['phase']:<9} return {record['return']:+.4f}",
        f"gain {record['loss_gain']:+.4f}", f"weight {100 * record['params_ratio']:.0f}%",
    ]  # fmt: skip
    if "log_likelihood" in update:
        words.append(f"likelihood {update['log_likelihood']:+.3f}")
    else:
        words += [f"KL {update.get('kl_worst', math.nan):.4f}", f"op entropy {update.get('entropy_op', math.nan):.3f}"]
    words += [f"{record['deaths']} deaths" if record["deaths"] else "",
              f"{seconds['play']:.0f}+{seconds['update']:.0f} s", clock(seconds["total"])]  # fmt: skip
    return "  ".join(word for word in words if word)


def render_training(training: Training, width: int) -> Group:
    """The live view of a training, `width` cells wide."""
    done, records = training.done, training.records
    spent = records[-1]["seconds"]["total"] if records else 0.0
    left = spent / done * (training.iterations - done) if done else None
    tail = f"  {clock(spent)}" + (f", {clock(left)} left" if left is not None else "")
    head = Text(f"iteration {done}/{training.iterations} ")
    room = max(4, width - head.cell_len - len(tail) - 1)
    lines = [
        Text.assemble((f"Tamiyo on {training.curriculum.name}", "bold"), (f"  {training.path}", "dim")),
        Text.assemble(head, bar(done / max(training.iterations, 1), room, "#2f9e62"), tail),
    ]
    if records:
        spark = max(8, min(60, width - 34))
        series = {"return": [r["return"] for r in records]}
        series |= {w: [r["worlds"].get(w) for r in records] for w in sorted({w for r in records for w in r["worlds"]})}
        heads = sorted({n for r in records for n in r["update"] if n.startswith("entropy_")})
        series |= {n.replace("_", " "): [r["update"].get(n) for r in records] for n in heads}
        for name, values in series.items():
            last = next((v for v in reversed(values) if v is not None), math.nan)
            drawn = sparkline(values, spark)
            lines.append(Text.assemble(f"{name[:20]:<20} ", (f"{last:+.4f} ", "bold"), (drawn, "cyan")))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return Group(*lines)


def show_evaluation(result: Mapping[str, Any]) -> None:
    """Print the table of contenders, over all worlds and by world."""
    console, cores = make_console(), list(result["cores"])
    plan = result["plan"]
    kind = "held out" if plan["held_out"] else "trained on"
    console.print(
        Text(f"{plan['curriculum']}, worlds {kind}, seed {plan['seed']}, return: nats gained less rent", "dim")
    )
    for title, summary in {"all worlds": result["summary"], **result["worlds"]}.items():
        count = next(iter(summary.values()))["contests"]
        table = make_table(f"{title} ({count})", "return", "weight", *(f"{c} minus it" for c in cores), header=True)
        for name, row in sorted(summary.items(), key=lambda item: -item[1]["return"]):
            minus = [_interval(summary[core]["minus"].get(name)) for core in cores]
            table.add_row(printable(name), f"{row['return']:+.4f}", f"{100 * row['params_ratio']:.0f}%", *minus)
        console.print()
        console.print(table)


def _interval(difference: Any) -> Text:
    if difference is None:
        return Text("")
    mean, low, high = difference
    if low is None:
        return Text(f"{mean:+.4f}")
    return Text(f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]", style="green" if low > 0 else "red" if high < 0 else "")


def describe_product(path: Path) -> dict[str, Any]:
    """The header of an agent or adapter file.

    Raises:
        BadFile: it is neither, or damaged.
    """
    from esper_core.storage.tensor_file import read_tensor_file
    from esper_core.tamiyo.adapter import FORMAT as ADAPTER
    from esper_core.tamiyo.adapter import load_adapter
    from esper_core.tamiyo.core import TamiyoCore

    _, header = read_tensor_file(path)
    size = path.stat().st_size
    if header.get("format") == ADAPTER:
        file = load_adapter(path)
        return {
            "file": str(path), "bytes": size, "is": "adapter", "kind": file.kind, "domain": file.domain,
            "base": file.base, "parameters": sum(t.numel() for t in file.tensors.values()),
            "options": dict(file.options), "lineage": dict(file.lineage),
        }  # fmt: skip
    core = TamiyoCore.load(path)
    return {
        "file": str(path), "bytes": size, "is": "core", "fingerprint": core.fingerprint,
        "parameters": sum(p.numel() for p in core.parameters()), "config": header["config"],
        "features": len(header["features"]), "lineage": core.lineage,
    }  # fmt: skip


def show_product(told: Mapping[str, Any]) -> None:
    """Print what `describe_product` returned, as text."""
    table = make_table("", "")
    rows = {key: value for key, value in told.items() if key != "lineage"}
    rows["parameters"], rows["bytes"] = quantity(told["parameters"]), quantity(told["bytes"])
    for key, value in [*rows.items(), *told["lineage"].items()]:
        if value not in (None, "", {}, []):
            table.add_row(Text(key.replace("_", " "), style="dim"), Text(printable(_plain(value))))
    make_console().print(table)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items() if v is not None)
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)
