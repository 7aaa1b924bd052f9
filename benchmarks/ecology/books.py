"""A sink that keeps its own books of a run, from nothing but the events."""

from __future__ import annotations

from typing import Any


class Books:
    """Follows every seed to its end, and adds up what the events say lives.

    Attributes:
        living: slot to (stage, parameters) of every seed in the model.
        verdicts, alarms, story: audits, governor's alarms and changes of stage, in order.
        worths: counterfactuals (step, slot, mean, low, high), nats; positive where the seed helps.
        curve: one row an epoch. regions: the latest budgets of regions.
        peak: the greatest number of seeds alive at once.
    """

    inline = True

    def __init__(self) -> None:
        self.living: dict[str, tuple[str, int]] = {}
        self.ended: list[str] = []
        self.verdicts: list[dict[str, Any]] = []
        self.alarms: list[str] = []
        self.worths: list[tuple[int, str, float, float, float]] = []
        self.story: list[str] = []
        self.curve: list[dict[str, Any]] = []
        self.regions: dict[str, Any] = {}
        self.grown = self.peak = 0
        self.host_params = 1
        self.last_loss: float | None = None

    def write(self, event: Any) -> None:
        """Take one event."""
        handler = getattr(self, f"_on_{event.kind}", None)
        if handler is not None:
            handler(event)

    @property
    def params(self) -> int:
        """Parameters of all seeds that live, by the events."""
        return sum(params for _, params in self.living.values())

    def fates(self) -> list[str]:
        """`culled`, or the stage in which the run's end found it, one a seed."""
        return [*self.ended, *(stage for stage, _ in self.living.values())]

    def flush(self) -> None:
        """Nothing is durable here."""

    def close(self) -> None:
        """Nothing is held."""

    def _on_run_started(self, event: Any) -> None:
        self.host_params = event.host_params

    def _on_stage_changed(self, event: Any) -> None:
        if event.source != "plane":
            self.story.append(f"{event.step} {event.slot} {event.before} to {event.after}: {event.reason}")
        self.grown += event.after == "germinated"
        if event.after in ("culled", "dormant"):
            if self.living.pop(event.slot, None):
                self.ended.append("culled")
        else:
            self.living[event.slot] = event.after, event.params
        self.peak = max(self.peak, len(self.living))

    def _on_audited(self, event: Any) -> None:
        self.verdicts.append({k: v for k, v in event.to_dict().items() if k != "kind"})

    def _on_counterfactual(self, event: Any) -> None:
        self.worths.append((event.step, event.slot, event.loss_mean, event.loss_low, event.loss_high))

    def _on_governor_alarm(self, event: Any) -> None:
        self.alarms.append(f"{event.step} {event.cause}: {event.value:.4g} against {event.limit:.4g}")

    def _on_regions(self, event: Any) -> None:
        self.regions = event.regions

    def _on_decided(self, event: Any) -> None:
        self.last_loss = event.validation_loss

    def _on_epoch_ended(self, event: Any) -> None:
        self.curve.append({
            "epoch": event.epoch, "validation_loss": event.validation_loss, "seed_params": event.seed_params,
            "accuracy": event.validation_score, "ratio": event.excess_params_ratio, "seeds": len(self.living),
            "by_events": self.params, "flops": event.total_flops,
        })  # fmt: skip
