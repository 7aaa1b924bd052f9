"""Imports `package.module:Name`; every failure becomes one clear error."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any, Final

from esper_core.leyline.errors import EsperError, MissingDependency, PluginBroken, did_you_mean
from esper_core.registry.discovery import normalised

_PACKAGE_OF: Final = MappingProxyType(
    {"sklearn": "scikit-learn", "yaml": "pyyaml", "PIL": "pillow", "cv2": "opencv-python", "skimage": "scikit-image"}
)
"""Packages that are not called as the module that they install."""


def import_object(reference: str, owner: str, distribution: str, install: str = "", *, function: bool = False) -> Any:
    """The object that `reference` names.

    Args:
        reference: `package.module` or `package.module:Name`.
        owner: who names it, for messages.
        distribution: the installed package of `owner`, in whose requirements an install line is sought.
        install: what to install when a dependency is missing, if `owner` says.

    Raises:
        MissingDependency: a module of another package is not installed; the hint is the install line.
        PluginBroken: anything else.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name:
        raise PluginBroken(f"{owner} names no module", 'text like "package.module"')
    try:
        target: Any = importlib.import_module(module_name)
        for part in filter(None, attribute.split(".")):
            target = getattr(target, part)
    except ModuleNotFoundError as error:
        raise _not_found(error, reference, owner, distribution, install) from error
    except AttributeError as error:
        if error.obj is None or getattr(error.obj, "__name__", None) != module_name:
            raise _fault(error, reference, owner) from error
        near = did_you_mean(str(error.name), vars(error.obj))
        raise PluginBroken(
            f"{owner} names {reference!r}, but {module_name} has no {error.name!r}", hint=near
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may raise anything, SystemExit included
        raise _fault(error, reference, owner) from error
    return target


def _fault(error: BaseException, reference: str, owner: str) -> PluginBroken:
    return PluginBroken(f"{owner} fails when {reference} is imported: {describe_error(error)}")


def _not_found(error: ModuleNotFoundError, reference: str, owner: str, distribution: str, install: str) -> EsperError:
    wanted, missing = reference.partition(":")[0], error.name or ""
    if missing and (wanted == missing or wanted.startswith(f"{missing}.")):
        return PluginBroken(f"{owner} names {reference!r}, but there is no module {missing!r}")
    top = missing.partition(".")[0]
    if not top or top == wanted.partition(".")[0] or is_installed(top):
        return _fault(error, reference, owner)  # a part of an installed package: a bug, not a missing package
    return MissingDependency(
        f"{owner} needs {top}, which is not installed", hint=install_line(distribution, top, install)
    )


def is_installed(module: str) -> bool:
    """Whether a top-level module can be found; nothing is imported."""
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except ValueError:  # in sys.modules without a spec, as __main__ or a test's stand-in may be
        return True


def missing_modules(requires: Iterable[str]) -> tuple[str, ...]:
    """Those of `requires` that are not installed."""
    return tuple(module for module in requires if not is_installed(module))


def install_line(distribution: str, module: str, install: str = "") -> str:
    """What to type so that `module` can be imported.

    It is `install` if given, else the requirement or extra of `distribution` that names the package, else a guess.
    """
    if install:
        return f"pip install '{install}'"
    from importlib.metadata import PackageNotFoundError, requires

    package = _PACKAGE_OF.get(module, module)
    try:
        requirements = requires(distribution) or []
    except PackageNotFoundError:  # registered by hand, not installed
        requirements = []
    for requirement in requirements:
        wanted, _, marker = requirement.partition(";")
        name = re.match(r"[\w.-]*", wanted.strip())
        if name and normalised(name[0]) == normalised(package):
            extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
            return f"pip install '{distribution}[{extra[1]}]'" if extra else f"pip install '{wanted.strip()}'"
    return f"pip install {package}"


def describe_error(error: BaseException) -> str:
    """An exception on one line: its type, its text, and the position of a syntax error."""
    text = " ".join(str(error).split())
    if isinstance(error, EsperError):
        return text
    if isinstance(error, SystemExit):
        return f"it calls exit({error.code!r})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
