"""Any model of transformers as a host: from a folder, from the cache, or with random weights from a known kind.

No remote code is run, no pickle is read, and nothing is fetched unless asked for. Where weights are random, the host's
notes say so.

Source: Wolf et al., "Transformers: State-of-the-Art Natural Language Processing", 2020, arXiv:1910.03771.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch
import transformers as library
from torch import Tensor, nn

from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.leyline.errors import BadFile, BadOption, EsperError, UnknownName, did_you_mean
from esper_hosts.resizing import fields_of, overrides

if TYPE_CHECKING:
    from esper_core.leyline.host import Inputs

CONTEXT: Final = 32
"""Tokens of the example where the task names no length."""

MODELS: Final = {
    "language-modelling": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "features": "AutoModel",
}


@attrs.frozen
class Named:
    """Hands a tensor to the model under the names of its arguments."""

    names: tuple[str, ...]

    def __call__(self, inputs: Inputs) -> Inputs:
        """A mapping for the model; a mapping stays as it is."""
        return dict.fromkeys(self.names, inputs) if isinstance(inputs, Tensor) else inputs


def transformers(
    argument: str = "",
    *,
    outputs: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    seed: int = 0,
    head: str = "auto",
    layers: int = 0,
    width: int = 0,
    heads: int = 0,
    context: int = 0,
    dropout: float = -1.0,
    attention: str = "auto",
    download: bool = False,
) -> ModuleHost:
    """The model `argument` as a host, with points found by measuring.

    Args:
        argument: a folder with `config.json` and safetensors, the name of a cached model, or a kind of model
            (`gpt2`, `bert`, `llama`, …), which gets random weights if none of that name are cached.
        outputs: size of the vocabulary, or classes; None for the model's own.
        input_shape: (L,) of tokens or (C, H, W) of images; None for 32 tokens.
        seed: of the weights that are random.
        head: what the model is for: `language-modelling`, `classification`, `features`, or `auto`: language modelling
            where the architecture is made for it, else classification; features where `outputs` is None.
        layers, width, heads, context: sizes; 0 for the configured ones. Not for weights that are loaded.
        dropout: everywhere in the model; negative for the configured one.
        attention: implementation, such as `eager` or `sdpa`.
        download: fetch a model that is not cached.

    Raises:
        UnknownName: no folder, cached model or kind of that name.
        BadOption: a size or head that the model cannot have.
        BadFile: weights that cannot be read.
    """
    sizes = {"layers": layers, "width": width, "heads": heads, "context": context}
    with _quiet():
        config, source = _find_config(argument, download)
        kind = _choose_head(config, head, outputs, input_shape)
        changes = _changes(config, source, kind, outputs, input_shape, sizes)
        changes |= {name: dropout for name in config.to_dict() if dropout >= 0 and _is_dropout(name, config)}
        config = _changed(config, changes)
        if attention != "auto":
            config._attn_implementation = attention
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model, notes = _build(kind, config, argument, source, download)
    if kind == "features" and model.base_model_prefix:
        prefix = model.base_model_prefix
        notes.append(f"without a head; a run, which adds one, calls points {prefix}.… and takes these names too")
    prepare = Named(_arguments(model))
    shape = tuple(input_shape or (CONTEXT,))
    return host_from_module(model, example=_example(config, shape), prepare=prepare, outputs=outputs, notes=notes)


def _find_config(argument: str, download: bool) -> tuple[Any, str]:
    """The configuration, and where its weights are: a folder, a name, or nothing for random ones."""
    path = Path(argument).expanduser()
    if path.is_dir() or argument.startswith((".", "/", "~")) or not argument:
        if not (path / "config.json").is_file() or not argument:
            raise UnknownName(
                f"transformers:{argument} is no model folder", "a folder with config.json", "--host transformers:gpt2"
            )
        try:
            config = library.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadFile(f"{path / 'config.json'} cannot be read: {error}", "a model's configuration") from error
        weights = any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file()
        if not weights and any(path.glob("*.bin")):
            raise BadFile(f"{path} holds weights as pickle only", "model.safetensors", "convert them to safetensors")
        return config, str(path) if weights else ""
    try:
        config = library.AutoConfig.from_pretrained(argument, local_files_only=not download, trust_remote_code=False)
        return config, argument
    except (OSError, ValueError, KeyError, TypeError) as error:
        if argument in library.CONFIG_MAPPING:
            return library.CONFIG_MAPPING[argument](), ""
        hint = (
            did_you_mean(argument, library.CONFIG_MAPPING) or f"--set transformers.download=true, or {_ask(argument)}"
        )
        raise UnknownName(
            f"transformers has no kind of model {argument!r}, and none of that name is cached",
            "a folder, a cached model or a kind such as gpt2, bert or llama",
            hint,
        ) from error


def _ask(argument: str) -> str:
    return f"transformers:{argument.rsplit('/', 1)[-1].split('-')[0].lower() or 'gpt2'}"


def _choose_head(config: Any, head: str, outputs: int | None, input_shape: tuple[int, ...] | None) -> str:
    kinds = [kind for kind in MODELS if type(config) in getattr(library, MODELS[kind])._model_mapping]
    image = input_shape is not None and len(input_shape) == 3
    if head == "auto" and outputs is None:
        wanted = "features"
    elif image:
        wanted = "image-classification"
    elif head == "auto":
        encoder = type(config) in library.AutoModelForMaskedLM._model_mapping
        wanted = "classification" if encoder or "language-modelling" not in kinds else "language-modelling"
    else:
        wanted = head
    if wanted not in kinds:
        raise BadOption(
            f"transformers has no {config.model_type} for {wanted}",
            f"one for {', '.join(kinds)}",
            "--host timm:resnet18, or --task pydoc" if image else "a host of that kind, or another --task",
        )
    return wanted


def _changes(
    config: Any, source: str, kind: str, outputs: int | None, input_shape: tuple[int, ...] | None, sizes: dict[str, int]
) -> dict[str, Any]:
    """The fields of the configuration to change."""
    asked = {name: size for name, size in sizes.items() if size}
    if source and asked:
        raise BadOption(
            f"transformers.{next(iter(asked))} is set, and the weights of {source} have their size",
            "sizes for random weights only",
        )
    length = input_shape[0] if input_shape and len(input_shape) == 1 else 0
    try:
        changed = overrides(config, **sizes)
        fields = fields_of(config, "context")
        if length and fields and length > changed.get(fields[0], getattr(config, fields[0])):
            if source or asked.get("context"):
                raise ValueError(f"it reads {getattr(config, fields[0])} tokens at most, and the task has {length}")
            changed |= overrides(config, context=length)
        if kind == "language-modelling" and outputs:
            known = config.get_text_config().vocab_size
            if source and outputs > known:
                raise ValueError(f"its weights know {known} tokens, and the task has {outputs}")
            changed |= {} if source else overrides(config, vocabulary=outputs)
    except ValueError as error:
        raise BadOption(
            f"{config.model_type}: {error}", "sizes that fit together", "esper plugins info transformers"
        ) from error
    if kind.endswith("classification"):
        if outputs:
            changed["num_labels"] = outputs
        if "pad_token_id" in config.to_dict() and config.pad_token_id is None:
            changed["pad_token_id"] = 0
    if kind == "image-classification" and input_shape and not source:
        channels, height, wide = input_shape
        own = config.to_dict()
        changed |= {"num_channels": channels} if "num_channels" in own else {}
        changed |= {"image_size": max(height, wide)} if type(own.get("image_size")) is int else {}
        if type(own.get("patch_size")) is int and own["patch_size"] * 4 > height:
            changed["patch_size"] = max(1, height // 4)
    return changed


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    """A new configuration with other values, so that what is derived from them follows."""
    given = {key: value for key, value in config.to_diff_dict().items() if key not in _DERIVED or not changes}
    labels = changes.pop("num_labels", None)
    new = type(config).from_dict({**given, **changes, "use_cache": False})
    if labels is not None:
        new.num_labels = labels
    return new


_DERIVED: Final = ("layer_types", "mlp_layer_types", "transformers_version", "id2label", "label2id")


def _is_dropout(name: str, config: Any) -> bool:
    return "drop" in name and type(getattr(config, name, None)) is float


def _build(kind: str, config: Any, argument: str, source: str, download: bool) -> tuple[nn.Module, list[str]]:
    family = getattr(library, MODELS[kind])
    if not source:
        try:
            model = family.from_config(config, trust_remote_code=False)
        except (ValueError, TypeError, ImportError, AttributeError, RuntimeError, KeyError, ZeroDivisionError) as error:
            raise EsperError(
                f"transformers:{argument} cannot be built: {type(error).__name__}: {error}", "other sizes or options"
            ) from error
        return model, [f"{argument} has random weights: none are given or cached"]
    try:
        model, info = family.from_pretrained(
            source, config=config, local_files_only=not download, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, dtype=torch.float32, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise BadFile(f"the weights of {source} cannot be read: {error}", "complete safetensors") from error
    fresh = sorted({str(key) for key in info["missing_keys"]} | {str(key[0]) for key in info["mismatched_keys"]})
    notes = (
        [f"random weights in {', '.join(fresh[:4])}{' …' if len(fresh) > 4 else ''}: {source} has none"]
        if fresh
        else []
    )
    return model, notes


def _arguments(model: Any) -> tuple[str, ...]:
    """The names of the arguments that take the input."""
    known = inspect.signature(model.forward).parameters
    name = str(model.main_input_name)
    both = model.config.is_encoder_decoder and name == "input_ids" and "decoder_input_ids" in known
    return (name, "decoder_input_ids") if both else (name,)


def _example(config: Any, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 3:
        return torch.zeros(1, *shape)
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", 0) or 2
    return (torch.arange(shape[0]) % max(1, min(vocabulary, 200) - 1) + min(1, vocabulary - 1))[None]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice on stderr while a model is built; the notes say what matters."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, library.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    library.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            library.utils.logging.enable_progress_bar()
