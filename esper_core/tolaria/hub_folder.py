"""A grown model as a folder in the form of the Hugging Face hub: weights, configuration and model card.

`save_pretrained` writes it and `from_pretrained` reads it. Nothing is uploaded and nothing is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from esper_core.kasmina.plane import Plane
from esper_core.leyline.errors import BadOption
from esper_core.leyline.host import OWN_MODEL
from esper_core.leyline.stages import STAGES
from esper_core.nissa.report.overview import summarise_run
from esper_core.registry import Registry
from esper_core.storage.tensor_file import read_json_file, write_json_file
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.model_file import load_model, load_plane, named_run, save_model

if TYPE_CHECKING:
    from esper_core.tolaria.grown import Grown
    from esper_core.tolaria.session import Tolaria

FORMAT: Final = "esper-pretrained-1"
_ORIGIN: Final = ("config", "task", "data", "parts", "own")


def save_pretrained(
    grown: Grown | Tolaria | Plane | str | Path,
    folder: str | Path,
    *,
    name: str = "",
    license: str = "",
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
    weights: str = "last",
    model: nn.Module | None = None,
) -> Path:
    """Write a grown model as a folder for the Hugging Face hub: `model.safetensors`, `config.json`, `README.md`.

    Args:
        grown: the result of `grow`, what `accompany` gave, a plane, or a run by folder or name.
        folder: is made; files of these names in it are replaced.
        name: title of the model card; empty for the folder's name.
        license: identifier such as `mit`, for the card.
        tags, datasets: further entries of the card's head.
        weights: of a run: `last`, or `best` for the checkpoint with the lowest validation loss.
        model: of a run by folder or name whose module is your own: an untrained one of the same class and sizes.

    Returns:
        The folder.

    Raises:
        BadFile, BadOption: there is no such run or weights.
        OSError: it cannot be written.
    """
    plane, about, result = _found(grown, weights, model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(plane, folder / "model.safetensors", about)
    told = _describe(plane, about, result)
    write_json_file(folder / "config.json", told)
    card = _card(told, name or folder.resolve().name, license, tags, datasets)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def save_weights(grown: Grown, file: Path) -> Path:
    """Write the weights alone, as one file."""
    plane, about, _ = _found(grown, "last")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_model(plane, file, about)
    return file


def from_pretrained(
    folder: str | Path, *, model: nn.Module | None = None, registry: Registry | None = None, device: str = "cpu"
) -> nn.Module:
    """The model in a folder that `save_pretrained` wrote, as a plain module in eval mode.

    Args:
        model: an untrained module like the one that grew. Needed only if its class is your own: models of timm and
            transformers and the hosts of `esper run` are built from what the folder says. No code is read from it.

    Raises:
        BadFile: no such folder, or it is damaged.
        BadOption: `model` is needed, or is not.
    """
    return load_model(folder, model=model, registry=registry, device=device)


def _found(grown: Any, weights: str, model: nn.Module | None = None) -> tuple[Plane, dict[str, Any], dict[str, Any]]:
    """Plane, origin and result."""
    if isinstance(grown, str | Path):
        path = named_run(grown)
        saved, header = load_plane(path, weights=weights, model=model)
        file = path / "result.json"
        read = read_json_file(file) if file.is_file() and weights == "last" else {}
        origin: dict[str, Any] = {key: header[key] for key in _ORIGIN if key in header}
        return saved, origin, _beside(path, read) if isinstance(read, dict) and read else {}
    if weights != "last":
        raise BadOption(f"weights={weights!r} of a model in memory", "a run's folder", "save_pretrained(FOLDER, …)")
    if model is not None:
        raise BadOption("model= beside a model in memory", "a run's folder, or no model=", "save_pretrained(grown, …)")
    plane: Plane = grown if isinstance(grown, Plane) else grown.plane
    result: dict[str, Any] = {}
    if hasattr(grown, "result"):  # of `grow`
        result, folder = grown.result.to_mapping(), grown.result.folder
        result = _beside(folder, result) if folder != Path() else {**result, "undecided": sorted(grown.undecided())}
    config = RunConfig(host=OWN_MODEL, blueprints=tuple(plane.candidates), seed=plane.seed)
    brought = {"name": "loaders", "kind": "", "outputs": 0, "input_shape": []}
    return plane, {"config": config.to_mapping(), "task": brought}, result


def _beside(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a run with what its folder tells beside it: undecided seeds, and the control if there is one."""
    run = summarise_run(folder)
    control, verdict = run["control"], run["verdict"]
    told: dict[str, Any] = {}
    if control is not None:
        count = control["seeds"]
        told["control"] = (
            f"{control['shown']['value']} {control['judge']['name']} by {control['what']}, grown "
            f"{control['shown']['grown']} ({f'means of {count} seeds' if count > 1 else '1 seed'}): "
            f"{verdict or control['shown']['difference']}"
        )
    return {**result, **told, "undecided": run["undecided"]}


def _describe(plane: Plane, about: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` says; the weights' file has the same in its header, which is what is read."""
    seeds = [
        {
            "slot": path,
            "blueprint": growth.blueprint,
            "stage": growth.stage.value,
            "merged": growth.merged,
            "undecided": path in result.get("undecided", ()),
        }
        for path, growth in plane.growths.items()
        if STAGES[growth.stage].contributes
    ]
    params = sum(p.numel() for p in plane.host.module.parameters()) + plane.ledger.seed_params
    module = type(plane.host.module)
    return {
        "format": FORMAT, "library_name": "esper", "model_type": "esper",
        "host": about["config"]["host"], "class": f"{module.__module__}.{module.__qualname__}",
        "base": _base(plane.host.module), "task": about["task"]["name"],
        "host_parameters": plane.host_params, "parameters": params, "seeds": seeds,
        "result": {key: result[key] for key in ("test_loss", "test_score", "validation_loss", "validation_score",
                                                "total_flops", "metric", "steps", "control")
                   if result.get(key) is not None},
    }  # fmt: skip


def _base(module: nn.Module) -> str:
    """Library and architecture of the host, where it has them."""
    cfg, config = getattr(module, "pretrained_cfg", None), getattr(module, "config", None)
    if isinstance(cfg, Mapping) and cfg.get("architecture"):
        return f"timm/{cfg['architecture']}"
    kind = getattr(config, "model_type", "")
    return f"transformers/{kind}" if kind else ""


def _card(told: Mapping[str, Any], name: str, license: str, tags: Sequence[str], datasets: Sequence[str]) -> str:
    """The model card: YAML between two rules, whose values are JSON, and Markdown below."""
    head: dict[str, Any] = {"library_name": "esper"}
    head |= {"license": license} if license else {}
    library = told["base"].partition("/")[0]
    head["tags"] = list(dict.fromkeys(["esper", "grown-network", *([library] if library else []), *tags]))
    head |= {"datasets": list(datasets)} if datasets else {}
    own = not told["base"] and told["host"] == OWN_MODEL
    call = 'from_pretrained("FOLDER", model=MODEL)' if own else 'from_pretrained("FOLDER")'
    share = told["parameters"] / max(1, told["host_parameters"]) - 1
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "", f"# {name}", ""]
    lines += [
        f"A network that grew while it trained, with Esper: {told['parameters']:,} parameters, {share:+.1%} over the "
        f"{told['host_parameters']:,} of the `{told['class']}` with which it began.", "",
        "```python", "import esper_core", "", f"model = esper_core.{call}  # a plain nn.Module in eval mode", "```", "",
    ]  # fmt: skip
    if own:
        lines += [f"`MODEL` is an untrained `{told['class']}` of the same sizes; its code is not in this folder.", ""]
    lines += ["## What grew", ""]
    lines += [
        f"- `{seed['blueprint']}` behind `{seed['slot']}`, {seed['stage']}{', undecided' * seed['undecided']}"
        for seed in told["seeds"]
    ] or ["Nothing: the weights are those of the host alone."]
    if any(seed["undecided"] for seed in told["seeds"]):
        lines += ["", "*Undecided*: kept although the interval of its gain reaches down to its rent."]
    result = told["result"]
    if result:
        metric = result.get("metric", {}).get("name", "score")
        lines += ["", "## Results", "", "| split | " + metric + " | loss |", "|---|---:|---:|"]
        for split in ("test", "validation"):
            score, loss = result.get(f"{split}_score"), result.get(f"{split}_loss")
            if score is not None and loss is not None:
                lines.append(f"| {split} | {score:.4f} | {loss:.4f} |")
        data = "its author's data" if told["host"] == OWN_MODEL else f"`{told['task']}`"
        control = f"Beside its control: {result['control']}." if "control" in result else (
            "One run, without its control: whether growing helped is not known.")  # fmt: skip
        lines += ["", f"Trained on {data} for {result.get('steps', 0):,} steps and "
                  f"{result.get('total_flops', 0.0):.3g} FLOP, what growing cost included. {control}"]  # fmt: skip
    return "\n".join([*lines, ""])
