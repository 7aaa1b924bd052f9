"""Options of `grow` and `accompany`: words of other libraries are understood, what would have no effect is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final

import attrs
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from esper_core.leyline.errors import BadOption, EsperError
from esper_core.leyline.events import Sink
from esper_core.tolaria.config import SYNONYMS, RunConfig

_WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "criterion": "loss=", "loss_fn": "loss=", "metrics": "metric=", "verbose": "progress=", "logger": "sinks=",
        "loggers": "sinks=", "callbacks": "sinks={'name': sink}", "max_steps": "epochs= with steps_per_epoch=",
        "momentum": "settings={'optimizer.momentum': 0.9}", "betas": "settings={'optimizer.beta2': 0.95}",
        "gradient_clip_val": "clip=", "grad_clip": "clip=", "max_grad_norm": "clip=", "precision": "amp=",
        "bf16": "amp='bf16'", "fp16": "amp='fp16'", "gradient_accumulation_steps": "accumulate=",
        "accumulate_grad_batches": "accumulate=", "log_dir": "out=", "save_dir": "out=", "random_state": "seed=",
        "budget": "budget_params=", "eta": "lr=", "steps": "epochs= with steps_per_epoch=", "gradient_clip": "clip=",
        "gradient_clipping": "clip=", "clip_grad_norm": "clip=", "warmup_steps": "warmup=, a share of the run",
        "warmup_ratio": "warmup=", "warmup_epochs": "warmup=, a share of the run",
    }
)  # fmt: skip
"""What other libraries call an option, and what it is here."""

_ELSEWHERE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "resume": "leave it out: the same call with the same out= resumes the run",
        "weights": 'esper_core.load_model(FOLDER, model=..., weights="best") after the run',
        "versus": "esper compare RUN --arms host@FLOPs",
        "compare": "esper compare RUN --arms host@FLOPs",
    }
)
"""What is done in another place than the options of `grow`."""

_OWN_DATA: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "host": ("the model that grows, as the first argument", "esper run --host"),
        "task": ("data as loaders", "esper run --task"),
        "download": ("data as loaders", "esper run --download"),
        "strategy": ("one process", "esper run --devices 2 --strategy"),
        "compile": ("a model that is not compiled", "esper run --compile blocks"),
        "recompute": ("a model that does it by itself", "esper run --recompute blocks"),
        "minutes": ("epochs=", "esper run --minutes"),
        "budget_total": ("epochs=", "esper run --budget-total"),
    }
)
"""Options of `esper run` without effect on a model of the caller's own: what is expected, and where they have one."""

_OWN_LOOP: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "epochs": ("steps=", ""), "steps_per_epoch": ("steps=", ""), "batch_size": ("the loader's own", ""),
        "schedule": ("the optimizer's own schedule", ""),
        "out": ("emit=, which takes the events, and save_progress", ""), "sinks": ("emit=, which takes the events", ""),
        "checkpoint_every": ("save_progress in the loop", ""), "keep_checkpoints": ("save_progress in the loop", ""),
    }
)  # fmt: skip
"""Options of `grow` that belong to the caller where the loop is theirs."""


_FLAG: Final = re.compile(r"(?<!\S)--([a-z][a-z-]*)[ =]([^\s,;]+)")


def in_python(text: str) -> str:
    """A message in which options of the command line are arguments of `grow` and `accompany`.

    >>> in_python("try --budget-params 30%")
    "try budget_params='30%'"
    >>> in_python("try --set governor.settle=4")
    "try settings={'governor.settle': 4}"
    >>> in_python("esper run --devices 2")
    'esper run --devices 2'
    """
    if "esper " in text:
        return text
    fields = {field.name for field in attrs.fields(RunConfig)}

    def argument(flag: re.Match[str]) -> str:
        name, value = flag[1].replace("-", "_"), flag[2]
        if name == "set" and "=" in value:
            key, _, given = value.partition("=")
            return f"settings={{{key!r}: {given}}}"
        if name not in fields:
            return flag[0]
        return f"{name}={value if re.fullmatch(r'[0-9.e+-]+', value) else repr(value)}"

    return _FLAG.sub(argument, text)


@contextmanager
def hints_in_python() -> Iterator[None]:
    """A context whose errors say what to write in Python."""
    try:
        yield
    except EsperError as error:
        told = EsperError(error.given, in_python(error.expected), in_python(error.hint))
        error.expected, error.hint, error.args = told.expected, told.hint, told.args
        raise


def read_options(options: Mapping[str, Any], fixed: Mapping[str, Any], *, loop: bool = False) -> RunConfig:
    """The configuration of a model of the caller's own.

    Args:
        options: as the caller gave them. fixed: what is not theirs to choose.
        loop: the training loop is the caller's too.

    Raises:
        BadOption: an option that does not exist, with the word that is meant, or one that has no effect here.
    """
    defaults = {field.name: field.default for field in attrs.fields(RunConfig)}
    idle = {**_OWN_DATA, **(_OWN_LOOP if loop else {})}
    for key, value in options.items():
        name = SYNONYMS.get(str(key), str(key))
        if name not in defaults and name in _WORDS:
            raise BadOption(f"unknown option {key!r}", hint=f"did you mean {_WORDS[name]}?")
        if name not in defaults and name in _ELSEWHERE:
            raise BadOption(f"unknown option {key!r}", hint=_ELSEWHERE[name])
        if name in idle and (name == "host" or value != defaults[name]):
            expected, elsewhere = idle[name]
            raise BadOption(f"{key}={value!r} has no effect here", expected, elsewhere)
    return RunConfig.from_mapping({**options, **fixed})


def check_model(model: object) -> None:
    """Refuse what is no module.

    Raises:
        BadOption: `model` is a class, a function, a name or anything else.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, str):
        hint = f"esper run --host {model}, or grow(MODULE, ...)"
    else:
        hint = f"{getattr(model, '__name__', 'Net')}()" if callable(model) else ""
    raise BadOption(f"the model is a {type(model).__name__}", "an nn.Module", hint)


def check_loader(name: str, loader: object) -> None:
    """Refuse a data set in place of a loader: its items are examples without a batch dimension.

    Raises:
        BadOption: `loader` is a data set of torch, or no iterable.
    """
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        hint = f"{name}=DataLoader(dataset, batch_size=64)"
        raise BadOption(f"{name} is a data set ({type(loader).__name__})", "a loader of batches", hint)
    if isinstance(loader, str) or not (isinstance(loader, Iterable) or hasattr(loader, "__getitem__")):
        raise BadOption(f"{name} is a {type(loader).__name__}", "an iterable of batches", f"{name}=DataLoader(...)")


def check_batch_size(options: Mapping[str, Any], loader: Iterable[Any]) -> None:
    """Refuse a batch size that is not the loader's.

    Raises:
        BadOption: it is another, or the loader does not tell its own.
    """
    asked = next((value for key, value in options.items() if SYNONYMS.get(key, key) == "batch_size"), None)
    own = getattr(loader, "batch_size", None)
    if asked is not None and asked != own:
        told = f"a loader of {own}" if own else "a loader"
        raise BadOption(f"batch_size={asked} beside {told}", "the batch size that the loader gives",
                        f"DataLoader(…, batch_size={asked})")  # fmt: skip


Sinks = Mapping[str, Sink] | str | Sequence[str] | None
"""Names of installed sinks, one or several, separated by commas or as a list; or sinks of the caller's own by name."""


def split_sinks(sinks: Sinks, options: Mapping[str, Any]) -> tuple[dict[str, Sink], list[str]]:
    """The caller's own sinks by name, and the names of installed ones.

    Args:
        options: as the caller gave them; `out` says whether the run has a folder.

    Raises:
        BadOption: installed sinks write into a folder, and there is none.
    """
    if isinstance(sinks, Mapping):
        return dict(sinks), []
    listed = sinks.split(",") if isinstance(sinks, str) else list(sinks or ())
    names = [str(name).strip() for name in listed if str(name).strip()]
    kept = any(value for key, value in options.items() if SYNONYMS.get(key, key) == "out")
    if names and not kept:
        hint = f'grow(…, sinks={sinks!r}, out="runs/NAME")'
        raise BadOption(f"sinks={sinks!r} without a folder to write into", "out=", hint)
    return {}, names
