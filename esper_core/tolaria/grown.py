"""What `grow` returns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import attrs
from torch import nn

from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import BadOption, EsperError
from esper_core.leyline.events import Event
from esper_core.leyline.host import OWN_MODEL
from esper_core.leyline.objective import Objective
from esper_core.nissa.plot import Plot, plot_events
from esper_core.nissa.report import write_report
from esper_core.nissa.report.control import ask_for_control
from esper_core.nissa.report.reading import read_events
from esper_core.nissa.report.wording import listed, nats, number, quantity, show_score
from esper_core.tolaria.progress import rows_as_table
from esper_core.tolaria.trainer import RunResult

_SHOWN: Final = 8
"""Seeds whose gains a summary tells."""
_CHANGES: Final = frozenset({"stage_changed"})


@attrs.frozen
class Grown:
    """The result of `grow`. A notebook shows it as a table with its curves.

    Attributes:
        plane: with the host and its seeds. result: how the run ended. events: everything that happened.
        objective: what it was trained and judged by.
        composed: the model with its seeds built in, or why there is none.
    """

    plane: Plane
    result: RunResult
    events: Sequence[Event]
    objective: Objective
    composed: nn.Module | EsperError

    @property
    def model(self) -> nn.Module:
        """An independent plain module with the seeds built in, in eval mode.

        The model that was given has been trained in place, and can continue to grow through `plane`.

        Raises:
            EsperError: it cannot be copied, of which there was a warning before training.
        """
        if isinstance(self.composed, EsperError):
            raise self.composed
        return self.composed

    def rows(self) -> dict[str, str]:
        """What the run reached, grew and cost, by name."""
        result = self.result
        split, loss, score = "test", result.test_loss, result.test_score
        if score is None:
            split, loss, score = "validation", result.validation_loss, result.validation_score
        doubt = self.undecided()
        seeds = [f"{path} ({self.plane.growths[path].blueprint}{', undecided' * (path in doubt)})"
                 for path in result.fossilized]  # fmt: skip
        each = {f"seed {path}": text for path, text in self._gains().items()}
        share = result.params / max(1, result.host_params) - 1
        told = {
            "status": f"{result.status} after {result.steps:,} steps",
            f"{split} {result.metric.name}": f"{show_score(score, result.metric, 2)}, loss {nats(loss)}",
            **self._control(),
            "fossilized": listed(seeds) or "no seed",
            **each,
            "parameters": f"{quantity(result.params)}, {share:+.1%} over the model's {quantity(result.host_params)}",
            "cost": quantity(result.total_flops, "FLOP"),
        }
        return {**told, "folder": str(result.folder)} if result.folder != Path() else told

    def _control(self) -> dict[str, str]:
        """The row that names the control, which one run does not have; none for the run that is one."""
        started = next((event.to_dict() for event in self.events if event.kind == "run_started"), {})
        if started.get("controller") == "wait" or self.result.status != "finished":
            return {}
        return {"control": f"not run, so whether growing paid is unknown; {ask_for_control('', OWN_MODEL)}"}

    def undecided(self) -> set[str]:
        """Slots whose seed was kept although the interval of its gain reaches down to the rent, or below."""
        figures = {slot: (low, rent) for slot, (_, low, _, rent) in self._figures().items()}
        return {slot for slot, (low, rent) in figures.items() if low is not None and rent is not None and low <= rent}

    def _gains(self) -> dict[str, str]:
        """What each kept seed gained when it was judged, for at most `_SHOWN` of them."""
        told, figures = {}, self._figures()
        for path in self.result.fossilized[:_SHOWN]:
            gain, low, high, rent = figures.get(path, (None,) * 4)
            if gain is None:
                told[path] = "kept unmeasured"
                continue
            ends = f" [{low:+.3g}, {high:+.3g}]" if low is not None and high is not None else ""
            told[path] = f"gain {gain:+.3g}{ends} nats against a rent of {nats(rent)}"
        left = len(self.result.fossilized) - len(told)
        return {**told, **({"…": f"{left} more, in the report"} if left > 0 else {})}

    def _figures(self) -> dict[str, tuple[float | None, ...]]:
        """Gain, its interval and the rent by which the last change of each slot was decided."""
        log = self.result.folder / "events.jsonl"
        kept = self.result.folder != Path() and log.is_file()  # the log holds what was before a run was resumed, too
        told = read_events(log, _CHANGES) if kept else (event.to_dict() for event in self.events)
        last = {str(event["slot"]): event for event in told if event is not None and event["kind"] in _CHANGES}
        keys = ("gain", "gain_low", "gain_high", "rent")
        return {slot: tuple(number(event.get(key)) for key in keys) for slot, event in last.items()}

    def summary(self) -> str:
        """The same as text, a line each."""
        rows = self.rows()
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report as one HTML file, and return its path.

        Args:
            out: where to write; None for `report.html` in the run's folder.

        Raises:
            BadOption: the run has no folder.
        """
        if self.result.folder == Path():
            raise BadOption("this run kept no folder, so it has no report", "a folder", 'grow(..., out="runs/NAME")')
        return write_report(self.result.folder, out)

    def save(self, path: str | Path, **card: Any) -> Path:
        """Save the grown model, for `from_pretrained` and `load_model`.

        Args:
            path: a folder, which gets weights, configuration and model card; or a file `NAME.safetensors` for weights.
            card: `name`, `license`, `tags`, `datasets` of the model card, see `save_pretrained`.

        Returns:
            What was written.

        Raises:
            OSError: it cannot be written.
        """
        from esper_core.tolaria.hub_folder import save_pretrained, save_weights

        path = Path(path)
        return save_weights(self, path) if path.suffix == ".safetensors" else save_pretrained(self, path, **card)

    def __str__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        """The summary as a table, and the curves below it."""
        return f"{rows_as_table(self.rows())}{self.plot().svg}"

    def plot(self) -> Plot:
        """The curves of validation score and loss, with the births and ends of seeds; `save(path)` writes an SVG."""
        return plot_events(event.to_dict() for event in self.events)
