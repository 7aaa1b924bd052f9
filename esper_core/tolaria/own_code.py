"""Code of the user's own that a host names: it runs where the user names it, never because a file does.

A run folder or a model file may come from elsewhere, and its host may be `module:FILE.py:NAME`. Whoever resumes,
evaluates or exports such a run names the code again; then the run is built with the file as it was named.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import attrs

from esper_core.leyline.errors import BadOption, EsperError
from esper_core.leyline.host import OWN_MODEL
from esper_core.leyline.specs import HostSpec
from esper_core.registry import Registry, split_reference
from esper_core.tolaria.config import RunConfig

_named: ContextVar[str] = ContextVar("esper_named_code", default="")


def runs_code(host: str, registry: Registry) -> bool:
    """Whether a host such as `module:net.py:Net` is code that its argument names."""
    try:
        spec = registry.find("host", split_reference(host)[0]).spec
    except EsperError:  # such as a model of the caller's own
        return False
    return isinstance(spec, HostSpec) and spec.code


def named_code() -> str:
    """What the user named, or the empty string."""
    return _named.get()


@contextmanager
def code_named(host: str) -> Iterator[None]:
    """Let, within, files that were grown from this code be opened.

    Args:
        host: as the user named it, `module:FILE.py:NAME`; empty for none.
    """
    token = _named.set(host)
    try:
        yield
    finally:
        _named.reset(token)


def refuse_own_loaders(config: RunConfig, source: object, instead: str) -> None:
    """Refuse a run of `grow` where its data are needed.

    Args:
        source: its folder. instead: what to do in Python.

    Raises:
        BadOption: it is one.
    """
    if config.host == OWN_MODEL:
        given = f"{source} was trained by grow() on loaders of your own, which its folder does not hold"
        raise BadOption(given, "a run of esper run; this one needs Python", instead)


def take_named(config: RunConfig, registry: Registry, source: object, instead: str = "") -> RunConfig:
    """The configuration from a file, with its code where the user named it.

    Args:
        source: the file or folder, for messages. instead: for a run of `grow`, whose data are needed: what to do.

    Raises:
        BadOption: the data are needed and were the caller's. Or the host is code and the user named
            none or other code, or named code and it is none.
    """
    named = named_code()
    if instead:
        refuse_own_loaders(config, source, instead)
    if not runs_code(config.host, registry):
        if named:
            given = f"--host {named} for {source}, whose host is {config.host}"
            raise BadOption(given, "a run of --host module:…", "leave --host out")
        return config
    recorded = config.host.rpartition(":")[2]
    if not named:
        raise BadOption(
            f"{source} grew from code of {config.host}, and no code runs because a file names it",
            "the code named by you, if you trust it", f"--host {config.host}",
        )  # fmt: skip
    if not runs_code(named, registry) or named.rpartition(":")[2] != recorded:
        raise BadOption(f"--host {named} for {source}, which grew from {config.host}", f"the {recorded} of it",
                        f"--host {config.host}")  # fmt: skip
    return attrs.evolve(config, host=named)
