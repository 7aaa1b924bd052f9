"""How a module of the caller's own is built again: what a saved model says of it, and what is made of that.

Models of timm and transformers are built again from their architecture and configuration. Any other module is code,
which no file can hold: the caller builds it and hands it over.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.leyline.errors import BadFile, BadOption, MissingDependency
from esper_core.leyline.files import typed
from esper_core.leyline.host import OWN_MODEL
from esper_core.leyline.specs import HostSpec
from esper_core.registry import Registry, split_reference
from esper_core.storage.tensor_file import expect_well_formed

_LIBRARIES: Final = ("timm", "transformers")
_MOST_NUMBERS: Final = 1 << 28
"""Numbers in an example that a file may ask for."""


def recipe_of(host: ModuleHost) -> dict[str, Any]:
    """JSON-compatible data by which `rebuild_host` makes the same host, without its weights."""
    module = host.module
    kind = type(module)
    return {
        "class": f"{kind.__module__}:{kind.__qualname__}",
        "points": list(host.paths.values()),
        "example": _shapes(host.example),
        **(_of_timm(module) or _of_transformers(module) or {"library": ""}),
    }


def check_buildable(recipe: object, source: object, host: str = OWN_MODEL) -> None:
    """Make sure that the host can be built without the caller.

    Args:
        host: as the run named it: a module of the caller's, or code in a file.

    Raises:
        BadOption: only the caller can build it.
        MissingDependency: its library is not installed.
    """
    told = recipe if isinstance(recipe, Mapping) else {}
    library, name = told.get("library", ""), _name_of(told)
    if library not in _LIBRARIES and host != OWN_MODEL:
        raise BadOption(
            f"{source} grew from code of {host}, and no code runs because a file names it",
            "the code named by you, if you trust it", f"--host {host}, or in Python load_model(…, model={name}(…))",
        )  # fmt: skip
    if library not in _LIBRARIES:
        name = "build" if str(told.get("class", "")).startswith("torch.") else name  # such as a Sequential
        run = (Path(str(source)) / "run.json").is_file()
        verb = f", or esper export {typed(str(source))} --host module:FILE.py:{name}" if run else ""
        raise BadOption(
            f"{source} grew from a module of your own, which only you can build", f"an untrained {_name_of(told)}",
            f"model={name}(...) in Python{verb}",
        )  # fmt: skip
    if importlib.util.find_spec(library) is None:
        raise MissingDependency(f"{source} grew from a model of {library}", "", f"pip install {library}")


def rebuild_host(recipe: Mapping[str, Any], model: nn.Module | None, source: object) -> ModuleHost:
    """The host that `recipe` describes, with any weights, on the CPU.

    Args:
        model: a module of the same class and sizes, which is changed; None to build it, where its library can.

    Raises:
        BadFile: the recipe is damaged, or describes no model of its library.
    """
    model = _built(recipe, source) if model is None else model
    return host_from_module(model.eval(), list(recipe["points"]), example=_example(recipe["example"]))


def _name_of(recipe: Mapping[str, Any]) -> str:
    return str(recipe.get("class", "")).rpartition(":")[2] or "Model"


def build_named(recipe: Mapping[str, Any], named: str, registry: Registry, source: object) -> nn.Module:
    """The untrained module of a run of `grow`, by code that the user named, as `module:FILE.py:NAME`.

    Raises:
        BadOption: a library builds the model, the code is no module of a file, or it cannot be built.
    """
    with expect_well_formed(source):
        grew, library, shape = str(recipe["class"]), recipe.get("library"), recipe["example"].get("shape")
    given = f"--host {named} for {source}, which grew from {grew}"
    kind, argument = split_reference(named)
    if library in _LIBRARIES:
        raise BadOption(given, f"a class of your own; {library} builds this one", "leave --host out")
    spec = registry.find("host", kind).spec
    name = _name_of(recipe)
    if not (isinstance(spec, HostSpec) and spec.code):
        raise BadOption(given, "the code that builds it", f"--host module:FILE.py:{name}")
    try:
        host = registry.build("host", kind, argument, input_shape=tuple(shape[1:]) if shape else None)
    except BadOption as error:
        raise BadOption(f"{given}: {error.given}", f"a class or function that builds {name} without arguments",
                        f"def build(): return {name}(…) in that file, and its name") from error  # fmt: skip
    module: nn.Module = host.module
    return module


def noise_of(recipe: Mapping[str, Any], count: int) -> Any:
    """`count` examples of the shapes that `recipe` tells, as the model takes them; see `_example`."""
    return _example(_widened(recipe["example"], count))


def _widened(told: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The shapes of an example, a batch of one, for a batch of `count`."""
    if "mapping" in told:
        return {"mapping": {key: _widened(value, count) for key, value in told["mapping"].items()}}
    if "list" in told:
        return {"list": [_widened(value, count) for value in told["list"]]}
    return {**told, "shape": [count, *told["shape"][1:]]} if told.get("shape") else dict(told)


def _built(recipe: Mapping[str, Any], source: object) -> nn.Module:
    build = _build_timm if recipe["library"] == "timm" else _build_transformers
    with torch.random.fork_rng(devices=[]):
        return build(recipe, source).to(getattr(torch, str(recipe.get("dtype", "float32"))))


# --- Examples ---


def _shapes(nest: Any) -> Any:
    """The shapes and dtypes of an example, which holds no data."""
    if isinstance(nest, Tensor):
        return {"shape": list(nest.shape), "dtype": str(nest.dtype).removeprefix("torch.")}
    if isinstance(nest, Mapping):
        return {"mapping": {str(key): _shapes(value) for key, value in nest.items()}}
    if isinstance(nest, tuple | list):
        return {"list": [_shapes(value) for value in nest]}
    return {"plain": nest if isinstance(nest, str | int | float | bool | None) else None}


def _example(told: Mapping[str, Any]) -> Any:
    """An example of these shapes: noise where it is floating, zeros elsewhere, except that masks are ones."""
    if "mapping" in told:
        return {key: _example({**value, "name": key}) for key, value in told["mapping"].items()}
    if "list" in told:
        return tuple(_example(value) for value in told["list"])
    if "plain" in told:
        return told["plain"]
    shape, dtype = [int(n) for n in told["shape"]], getattr(torch, str(told["dtype"]))
    numbers = 1
    for size in shape:
        numbers *= size
    if min(shape, default=0) < 0 or numbers > _MOST_NUMBERS or not isinstance(dtype, torch.dtype):
        raise BadFile(f"an example of shape {shape}", "the shape of one example")
    if dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return (torch.ones if "mask" in str(told.get("name", "")) else torch.zeros)(shape, dtype=dtype)


# --- Libraries ---


def _of_timm(module: nn.Module) -> dict[str, Any] | None:
    """The recipe of a timm model whose sizes are those of its architecture, apart from classes and channels."""
    cfg = getattr(module, "pretrained_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, Mapping) else None
    if not name or importlib.util.find_spec("timm") is None:
        return None
    first = next((p for p in module.parameters() if p.dim() == 4), None)
    recipe = {
        "library": "timm", "architecture": str(name), "dtype": _dtype(module),
        "outputs": int(getattr(module, "num_classes", 0)), "channels": int(first.shape[1]) if first is not None else 3,
    }  # fmt: skip
    try:
        with torch.device("meta"):
            again = _build_timm(recipe, name)
    except Exception:  # noqa: BLE001 - timm builds any architecture's code, and another size of it may raise anything
        return None
    return recipe if _sizes(again) == _sizes(module) else None


def _build_timm(recipe: Mapping[str, Any], source: object) -> nn.Module:
    library = importlib.import_module("timm")
    name = str(recipe["architecture"])
    if not library.is_model(name):
        raise BadFile(f"{source} grew from timm's {name!r}", "a timm that has it", "pip install --upgrade timm")
    built: nn.Module = library.create_model(
        name, pretrained=False, num_classes=int(recipe["outputs"]), in_chans=int(recipe["channels"])
    )
    return built


def _of_transformers(module: nn.Module) -> dict[str, Any] | None:
    """The recipe of a model whose class is one of transformers' own."""
    kind, config = type(module), getattr(module, "config", None)
    if kind.__module__.partition(".")[0] != "transformers" or not hasattr(config, "to_json_string"):
        return None
    assert config is not None
    return {
        "library": "transformers", "class": f"transformers:{kind.__name__}", "dtype": _dtype(module),
        "config": json.loads(config.to_json_string(use_diff=False)),
        "attention": str(getattr(config, "_attn_implementation", "") or ""),
    }  # fmt: skip


def _build_transformers(recipe: Mapping[str, Any], source: object) -> nn.Module:
    library: Any = importlib.import_module("transformers")
    kind: Any = getattr(library, str(recipe["class"]).rpartition(":")[2], None)
    if not (isinstance(kind, type) and issubclass(kind, library.PreTrainedModel)):
        raise BadFile(f"{source} grew from {recipe['class']}", "a model class of transformers")
    told = {key: value for key, value in recipe["config"].items() if key not in ("auto_map", "dtype", "torch_dtype")}
    chosen: Any = kind
    config = chosen.config_class.from_dict(told)
    if recipe.get("attention") in ("eager", "sdpa"):
        config._attn_implementation = recipe["attention"]
    built: nn.Module = chosen(config)
    return built


def _dtype(module: nn.Module) -> str:
    found = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return str(found).removeprefix("torch.")


def _sizes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}
