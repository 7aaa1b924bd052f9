"""Registers the sinks that ship with Esper. Import-light: factories are named, not imported."""

from __future__ import annotations

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.specs import SinkSpec


@hookimpl
def esper_sinks() -> list[SinkSpec]:
    """Every sink of this package."""
    return [
        SinkSpec(
            name="jsonl",
            summary="events.jsonl in the run folder: one event a line, append-only, resumable; always on",
            factory="esper_plugins.sinks.jsonl:JsonLines",
        ),
        SinkSpec(
            name="tensorboard",
            summary="TensorBoard files in the run folder's tensorboard/",
            factory="esper_plugins.sinks.tensorboard:TensorBoard",
            requires=("tensorboard",),
            install="esper-core[tensorboard]",
        ),
    ]
