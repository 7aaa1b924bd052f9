"""The grown model as one file that reloads without the user's code: weights, structure and origin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn

from esper_core.kasmina.compose import compose
from esper_core.kasmina.merging import digests
from esper_core.kasmina.module_host import ModuleHost
from esper_core.kasmina.plane import Plane
from esper_core.kasmina.probe import odd_ones, probe
from esper_core.leyline.errors import BadFile, BadOption
from esper_core.leyline.files import refuse_links, typed
from esper_core.leyline.host import OWN_MODEL, HostProtocol, TaskProtocol
from esper_core.leyline.stages import STAGES, Stage
from esper_core.registry import Registry, load_registry, split_reference
from esper_core.registry.origin import Origins, describe_parts, not_as_written
from esper_core.storage.tensor_file import expect_well_formed, read_json_file, read_tensor_file, write_tensor_file
from esper_core.tolaria.assembly import build_host, build_plane
from esper_core.tolaria.checkpoint import Checkpoints
from esper_core.tolaria.config import RunConfig
from esper_core.tolaria.offline import offline, without_fetching
from esper_core.tolaria.origin import named_parts
from esper_core.tolaria.own_code import named_code, runs_code, take_named
from esper_core.tolaria.recipe import build_named, check_buildable, rebuild_host, recipe_of
from esper_core.tolaria.run_names import ROOT, is_run, list_runs
from esper_core.tolaria.snapshot import load_weights, model_tensors
from esper_core.tolaria.timetable import Timetable

FORMAT: Final = "esper-model-1"
GROWTH_FORMAT: Final = "esper-growth-1"
WEIGHTS: Final = ("last", "best")


def describe_origin(config: RunConfig, task: TaskProtocol) -> dict[str, Any]:
    """The data needed to rebuild the bare host without the task's data."""
    return {
        "config": attrs.evolve(config, out="").to_mapping(),
        "task": {
            "name": task.name,
            "kind": task.kind,
            "outputs": task.outputs,
            "input_shape": list(task.input_shape),
        },
    }


def save_model(plane: Plane, path: Path | None, about: Mapping[str, Any]) -> None:
    """Write the grown model; every process calls, and the one with a path writes.

    Args:
        path: of the file; None to help the process that writes. about: `describe_origin()`'s answer.

    Raises:
        OSError: it could not be written.
    """
    if path is None and not plane.ranks.sharded:
        return
    config = RunConfig.from_mapping(about["config"])
    header = {"format": FORMAT, **about, **growth_of(plane, config)}
    own = config.host == OWN_MODEL or runs_code(config.host, plane.registry)
    if own and isinstance(plane.host, ModuleHost):
        header["own"] = recipe_of(plane.host)
    tensors = {name: plane.ranks.whole(tensor) for name, tensor in model_tensors(plane).items()}
    if path is not None:
        path.parent.mkdir(exist_ok=True)
        if path.parent.is_symlink():  # put there since the run began
            raise OSError(f"{path.parent} is a link to elsewhere")
        write_tensor_file(path, tensors, header)


def save_growth(plane: Plane, path: str | Path) -> None:
    """Write the seeds of a plane, without its host, for a model that is built and saved elsewhere.

    Raises:
        OSError: it could not be written.
    """
    seeds = {name: tensor for name, tensor in model_tensors(plane).items() if name.startswith("plane.")}
    write_tensor_file(path, seeds, {"format": GROWTH_FORMAT, **growth_of(plane)})


def bind(registry: Registry, origins: Origins) -> Registry:
    """The registry for the names of one file.

    Raises:
        MissingDependency, UnknownName: a part that the file names is not installed; the hint is the install line.
    """
    bound = registry.bound(origins)
    for kind, name in origins.owners:
        bound.find(kind, name)
    return bound


def growth_of(plane: Plane, config: RunConfig | None = None) -> dict[str, Any]:
    """Structure of the seeds, origins of their parts, and their outputs for a fixed input."""
    live = [growth for growth in plane.growths.values() if STAGES[growth.stage].occupied]
    names = [("blueprint", growth.blueprint) for growth in live]
    if config is not None and config.host != OWN_MODEL:
        names.append(("host", split_reference(config.host)[0]))
    blends = [growth.blend for growth in live]
    return {
        "structure": plane.structure(),
        "blend_options": plane.blend_options,
        "origins": describe_parts(named_parts(plane.registry, names, blends)),
        "probes": probe(plane),
        "merged": digests(plane),
    }


def load_growth(plane: Plane, path: str | Path, *, weights_follow: bool = False) -> None:
    """Grow on `plane` the seeds that `save_growth` wrote; the host's weights are not touched.

    Args:
        weights_follow: the host's weights are loaded after this, so that they cannot be compared yet.

    Raises:
        BadFile: damaged, made for another host, or a seed is merged into weights that the host does not have.
    """
    tensors, header = read_tensor_file(path)
    if header.get("format") != GROWTH_FORMAT:
        raise BadFile(f"{path} holds no seeds", f"format {GROWTH_FORMAT}")
    with expect_well_formed(path):
        origins = Origins.read(header.get("origins", {}))
    plane.registry = bind(plane.registry, origins)
    own = plane.candidates.of_run, plane.blend_options
    try:
        with _as_written(path, origins, plane.registry):
            plane.candidates.of_run = {**own[0], **_options_in(header["structure"])}
            plane.blend_options = {**own[1], **header.get("blend_options", {})}
            plane.rebuild(header["structure"])
            host = {name: tensor for name, tensor in model_tensors(plane).items() if name.startswith("host.")}
            load_weights(plane, {**host, **tensors}, path)
            _check_answers(header, plane)
        if not weights_follow:
            check_merged(header, plane, path)
    finally:
        plane.candidates.of_run, plane.blend_options = own


def check_merged(header: Mapping[str, Any], plane: Plane, source: object) -> None:
    """Refuse a host whose weights do not hold the seeds that were merged into them.

    Raises:
        BadFile: so it is.
    """
    recorded, now = header.get("merged", {}), digests(plane)
    for path in now:
        if recorded.get(path) != now[path]:
            raise BadFile(
                f"{source}: the seed at {path} was merged into its layer, and the model's weight there is another",
                "the weights that were saved with it", "load the model's own checkpoint first",
            )  # fmt: skip


def _options_in(structure: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options with which each blueprint of a file was built."""
    return {str(entry["blueprint"]): dict(entry["options"]) for entry in structure if entry["blueprint"]}


@contextmanager
def _as_written(source: object, origins: Origins, registry: Registry) -> Iterator[None]:
    """If a file no longer fits, name the packages that have changed since it was written.

    Raises:
        BadFile: in place of what malformed data provokes.
    """
    try:
        with expect_well_formed(source):
            yield
    except BadFile as error:
        if not origins.changed(registry.distributions):
            raise
        raise not_as_written(error.given, origins, registry.distributions, BadFile) from error


def _check_answers(header: Mapping[str, Any], plane: Plane) -> None:
    odd = odd_ones(header.get("probes", {}), plane)
    if odd:
        names = ", ".join(f"{plane.growths[path].blueprint} at {path}" for path in odd)
        raise BadFile(f"grown parts compute something else than when they were saved: {names}")


def load_plane(
    path: str | Path, registry: Registry | None = None, *, model: nn.Module | None = None, weights: str = "last"
) -> tuple[Plane, dict[str, Any]]:
    """The plane of a saved model with its host, on the CPU, and the file's header.

    Args:
        path: a run's folder or its name in `runs/`, `latest`, a folder of `save_pretrained`, or a model file.
        model: an untrained module like the one that `grow` was given, where no library builds it; it is changed.
        weights: `last`, or `best` for those with the lowest validation loss: of a checkpoint, or the last.

    Raises:
        BadFile: no model is there, or it is damaged.
        BadOption: `model` or `weights` do not suit what is there.
    """
    path = named_run(path)
    if weights not in WEIGHTS:
        raise BadOption(f"weights={weights!r}", " or ".join(WEIGHTS), 'weights="best"')
    if path.is_dir():
        refuse_links(path)
    file = path / "model" / "model.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.is_file() and (path / "model.safetensors").is_file():
        file = path / "model.safetensors"
    if not file.is_file():
        hint = f"esper resume {typed(path)}" if (path / "run.json").exists() else "esper runs list"
        raise BadFile(f"there is no grown model at {path}", "a finished run or a model file", hint)
    registry = registry or load_registry()
    tensors, header = read_tensor_file(file)
    if header.get("format") != FORMAT:
        raise BadFile(f"{file} is no grown model", f"format {FORMAT}")
    with expect_well_formed(file):
        origins = Origins.read(header.get("origins", {}))
        config = without_fetching(RunConfig.from_mapping(header["config"]), weights=False)  # the file has them
        outputs, shape = int(header["task"]["outputs"]), tuple(int(n) for n in header["task"]["input_shape"])
    registry = bind(registry, origins)
    own = config.host == OWN_MODEL or (runs_code(config.host, registry) and not named_code())
    named = named_code()
    if config.host == OWN_MODEL and named:
        if model is not None:
            raise BadOption(f"--host {named} and model= for {path}", "one of them", f"model= without {named}")
        model = build_named(header.get("own", {}), named, registry, path)
    elif not own or named:
        config = take_named(config, registry, path)
    if not own and model is not None:
        raise BadOption(f"model= for {path}", f"nothing: its host is {config.host}, which Esper builds", "no model=")
    if own and model is None:
        check_buildable(header.get("own"), path, config.host)
    if weights == "best":
        tensors = _best(path, header) or tensors
    with _as_written(file, origins, registry):
        entries = sum(1 for entry in header["structure"] if entry["params"])
        if entries > len(tensors):  # before so many seeds are built
            raise BadFile(f"{file} names {entries} seeds and holds {len(tensors)} tensors", "one or more for each seed")
        with offline():
            if own:
                host: HostProtocol = rebuild_host(header["own"], model, path)
            else:
                host = build_host(config, registry, outputs, shape)
        needed = _needed(config, header["structure"])
        plane = build_plane(needed, registry, host, host_flops=0, timetable=Timetable.of_steps(config, 1))
        plane.rebuild(header["structure"])
        load_weights(plane, tensors, file)
        _check_answers(header, plane)
    return plane, header


def _best(path: Path, header: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of the best checkpoint of a run, whose structure `header` is given; None if the last are better.

    Raises:
        BadOption: there is no run with checkpoints.
    """
    checkpoints = Checkpoints(path / "checkpoints")
    best = checkpoints.best() if path.is_dir() else None
    if best is None:
        raise BadOption(f"weights='best' of {path}", "a run's folder with checkpoints", "weights='last'")
    told = read_json_file(path / "result.json") if (path / "result.json").is_file() else {}
    last = told.get("validation_loss") if isinstance(told, Mapping) else None
    if isinstance(last, float) and last <= checkpoints.loss(best):
        return None
    tensors, plain = checkpoints.load(best)
    with expect_well_formed(path):
        header |= {"structure": plain["training"]["structure"], "probes": {}, "step": best}
    return tensors


def named_run(path: str | Path) -> Path:
    """What the command line understands by `path`: a path, a name in `runs/`, or `latest`."""
    path = Path(path)
    if path.exists():
        return path
    if str(path) == "latest":
        return next(iter(list_runs(ROOT)), path)
    return ROOT / path if is_run(ROOT / path) else path


def _needed(config: RunConfig, structure: Iterable[Mapping[str, Any]]) -> RunConfig:
    """The configuration with no more parts than live in the structure: others need not be installed to load it."""
    live = [entry for entry in structure if STAGES[Stage(entry["stage"])].occupied]
    if not live:
        return config
    blueprints, blends = (tuple(dict.fromkeys(str(entry[key]) for entry in live)) for key in ("blueprint", "blend"))
    return attrs.evolve(config, blueprints=blueprints, blends=blends)


def load_model(
    path: str | Path, *, model: nn.Module | None = None, weights: str = "last", registry: Registry | None = None,
    device: str = "cpu",
) -> nn.Module:  # fmt: skip
    """The grown model as a plain module in eval mode, with its seeds built in and no hooks.

    Args:
        path: a run's folder or its name in `runs/`, `latest`, a folder of `save_pretrained`, or a model file.
        model: an untrained module like the one that `grow` was given. Needed only if its class is your own: models of
            timm and transformers are built from what the file says.
        weights: `last`, or `best` for those with the lowest validation loss among the last and the run's checkpoints.
            These are written at the ends of epochs, as `checkpoint_every` says; the best one is kept.
        device: where the model goes.

    Raises:
        BadFile: no model is there, or it is damaged.
        BadOption: `model` or `weights` do not suit what is there.
        EsperError: the host cannot be rewritten as a plain module.
    """
    plane, _ = load_plane(path, registry, model=model, weights=weights)
    return compose(plane).eval().to(torch.device(device))
