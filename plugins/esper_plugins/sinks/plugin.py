"""Registers the sinks that ship with Esper. Import-light: factories are named, not imported."""

from __future__ import annotations

from esper_core.leyline.hookspecs import hookimpl
from esper_core.leyline.options import Option
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
            summary="TensorBoard files in the run folder's tensorboard/: loss/train, accuracy/val, hyperparameters",
            factory="esper_plugins.sinks.tensorboard:TensorBoard",
            requires=("tensorboard",),
            install="esper-core[tensorboard]",
        ),
        SinkSpec(
            name="csv",
            summary="csv/epochs.csv, a row for each epoch, and csv/metrics.csv, every number, in the run folder",
            factory="esper_plugins.sinks.csv_files:CsvFiles",
        ),
        SinkSpec(
            name="wandb",
            summary="Weights & Biases: offline in the run folder's wandb/, or online",
            factory="esper_plugins.sinks.weights_and_biases:WandB",
            options=(
                Option("mode", "str", "offline", "files only, or sent to the server", choices=("offline", "online")),
                Option("project", "str", "esper", "project of the run"),
                Option("entity", "str", "", "user or team; empty: the default of the account"),
            ),
            requires=("wandb",),
            install="esper-core[wandb]",
        ),
        SinkSpec(
            name="mlflow",
            summary="MLflow: a store of files in the run folder's mlflow/, or a tracking server",
            factory="esper_plugins.sinks.mlflow_run:MlFlow",
            options=(
                Option("uri", "str", "", "tracking server; empty: files in the run folder"),
                Option("experiment", "str", "esper", "experiment of the run"),
            ),
            requires=("mlflow",),
            install="esper-core[mlflow]",
        ),
    ]
