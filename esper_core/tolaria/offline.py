"""Files never cause network access: only options that the user types do.

A run folder or a model file may come from elsewhere, and its configuration names hosts and tasks that can fetch.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Final

import attrs

from esper_core.tolaria.config import RunConfig

_ENVIRONMENT: Final = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_FLAGS: Final = MappingProxyType(
    {
        "huggingface_hub.constants": ("HF_HUB_OFFLINE",),
        "datasets.config": ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
    }
)
"""Modules that read the environment once, when they are imported, and what they keep of it."""

_offline: ContextVar[bool] = ContextVar("esper_offline", default=False)


class NetworkRefused(ConnectionError):
    """A file asked for the network."""


def without_fetching(config: RunConfig, *, weights: bool = True) -> RunConfig:
    """`config` with everything off that would fetch.

    Args:
        weights: whether published weights may be used where they are on this machine.
    """
    off = {"download"} | (set() if weights else {"pretrained"})
    settings = {key: value for key, value in config.settings.items() if key.rpartition(".")[2] not in off}
    return attrs.evolve(config, download=False, settings=settings)


def with_fetching(config: RunConfig, origin: RunConfig) -> RunConfig:
    """`config` with what `without_fetching` took from `origin`, so that a record says what was asked for."""
    return attrs.evolve(config, download=origin.download, settings={**origin.settings, **config.settings})


@contextmanager
def offline(active: bool = True) -> Iterator[None]:
    """Refuse, within, what would reach for the network in this thread.

    Args:
        active: False to change nothing.

    Raises:
        NetworkRefused: at the attempt.
    """
    if not active:
        yield
        return
    _install()
    token = _offline.set(True)
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    kept = {(module, name): getattr(sys.modules[module], name, None) for module, name in _flags()}
    os.environ.update(dict.fromkeys(_ENVIRONMENT, "1"))
    for module, name in _flags():
        setattr(sys.modules[module], name, True)
    try:
        yield
    finally:
        _offline.reset(token)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        told = any(value not in (None, "", "0", "false", "False") for value in before.values())
        for module, name in _flags():
            setattr(sys.modules[module], name, kept.get((module, name), told))


def _flags() -> list[tuple[str, str]]:
    return [(module, name) for module, names in _FLAGS.items() if module in sys.modules for name in names]


def _install() -> None:
    """Have Python's sockets ask before they resolve a name or connect. Done once; only threads within are refused."""
    if getattr(socket.getaddrinfo, "esper", False):
        return

    def guarded(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if _offline.get():
                raise NetworkRefused("reading a file needs the network, which only --download allows")
            return function(*args, **kwargs)

        call.esper = True  # type: ignore[attr-defined]
        return call

    socket.getaddrinfo = guarded(socket.getaddrinfo)
    socket.create_connection = guarded(socket.create_connection)
