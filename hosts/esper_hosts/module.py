"""A module of the user's own, from a file of Python, as a host.

The file is code and is run: it is the user who names it. Esper never runs it because a run folder or a model file does.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn

from esper_core.kasmina.module_host import ModuleHost, host_from_module
from esper_core.leyline.errors import BadFile, BadOption, EsperError, UnknownName, did_you_mean

_LONGEST: Final = 1 << 20
"""Bytes of a file of Python that is read."""


def module(
    argument: str = "",
    *,
    outputs: int | None = None,
    input_shape: tuple[int, ...] | None = None,
    seed: int = 0,
    args: str = "",
) -> ModuleHost:
    """The class or function NAME of a file, called, as a host with points found by measuring.

    Parameters called `outputs`, `num_classes` or `vocab_size` get the task's outputs, `input_shape` its shape,
    `in_channels` or `in_chans` the first of three dimensions, and `seed` the run's seed.

    Args:
        argument: `FILE.py:NAME`, where NAME is a class or a function that answers with an `nn.Module`.
        outputs: classes or tokens of the task.
        input_shape: of one example, without the batch; one dimension is tokens where the module takes whole numbers.
        seed: of the initial weights.
        args: further arguments by name, such as `width=64,norm='batch'`.

    Raises:
        BadFile: there is no such file, or it cannot be imported.
        UnknownName: the file has nothing of that name.
        BadOption: the arguments do not fit, or what is built is no module.
        EsperError: the module does not run on examples of that shape, or has no point at which to grow.
    """
    path, name = split_argument(argument)
    code = import_file(path)
    build = _find(code, path, name)
    given, notes = _arguments(build, name, args, outputs, input_shape, seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            built = build(**given)
        except EsperError:
            raise
        except (Exception, SystemExit) as error:
            raise BadOption(
                f"{path.name}:{name} cannot be built: {type(error).__name__}: {error}", "arguments that it takes",
                '--set "module.args=width=64"',
            ) from error  # fmt: skip
    if not isinstance(built, nn.Module):
        raise BadOption(f"{path.name}:{name} gives a {type(built).__name__}", "an nn.Module")
    host = _host(built, path, name, outputs, input_shape, notes)
    host.fingerprint = f"{path.name}:{name} {fingerprint(path)}"
    return host


def split_argument(argument: str) -> tuple[Path, str]:
    """File and name of `FILE.py:NAME`.

    Raises:
        BadOption: it is not of that form. BadFile: there is no such file.
    """
    file, separator, name = argument.rpartition(":")
    if not separator or not file.endswith(".py") or not name.isidentifier():
        file = argument if argument.endswith(".py") else file
        names = _modules_in(Path(file)) if file.endswith(".py") and Path(file).is_file() else []
        hint = f"--host module:{file if file.endswith('.py') else 'net.py'}:{names[0] if names else 'Net'}"
        raise BadOption(f"module:{argument} names no class of a file", "module:FILE.py:CLASS", hint)
    path = Path(file)
    if not path.is_file():
        raise BadFile(f"there is no file {file}", "a file of Python", "--host module:FILE.py:CLASS")
    return path, name


def import_file(path: Path) -> ModuleType:
    """Run a file of Python as a module; modules beside it can be imported, after those that are installed.

    Raises:
        BadFile: it is too large, or raises.
    """
    if path.stat().st_size > _LONGEST:
        raise BadFile(f"{path} has over {_LONGEST:,} bytes", "a file of Python")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"esper_module_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = code
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(code)
    except EsperError:
        raise
    except (Exception, SystemExit) as error:
        line = next((f.lineno for f in _frames(error) if f.filename == str(path.resolve())), None)
        where = f", line {line}" if line else ""
        raise BadFile(f"{path}{where} cannot be run: {type(error).__name__}: {error}", "a file that Python can import",
                      f"python {path}") from error  # fmt: skip
    return code


def fingerprint(path: Path) -> str:
    """Twelve hexadecimal digits over the file and the files beside it that it imports, and those that they import."""
    digest = hashlib.sha256()
    root = path.resolve().parent
    for file in sorted(_imported(path.resolve(), root, set())):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _imported(path: Path, root: Path, seen: set[Path]) -> set[Path]:
    """`path` and what it imports from the folder `root`, beside what was `seen`."""
    if path in seen:
        return seen
    seen.add(path)
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return seen
    for node in ast.walk(tree):
        names: list[str] = []
        base = root
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if node.level else root
            start = f"{node.module}." if node.module else ""
            names = [start[:-1], *(f"{start}{alias.name}" for alias in node.names)]
        for name in filter(None, names):
            stem = base.joinpath(*name.split("."))
            for file in (stem.with_suffix(".py"), stem / "__init__.py"):
                if file.is_file() and file.is_relative_to(root):
                    _imported(file, root, seen)
    return seen


def _frames(error: BaseException) -> Iterator[Any]:
    """Places in files that an error names, the innermost first."""
    import traceback

    if isinstance(error, SyntaxError):
        yield traceback.FrameSummary(error.filename or "", error.lineno or 0, "")
    yield from reversed(traceback.extract_tb(error.__traceback__))


def _modules_in(path: Path) -> list[str]:
    """Names of classes whose bases say `Module`, the last first; nothing is run."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return [node.name for node in reversed(classes) if any("Module" in ast.unparse(base) for base in node.bases)]


def _find(code: ModuleType, path: Path, name: str) -> Callable[..., Any]:
    found = getattr(code, name, None)
    if found is None:
        names = [known for known, value in vars(code).items() if callable(value) and not known.startswith("_")]
        hint = did_you_mean(name, names)
        own = _modules_in(path)
        raise UnknownName(f"{path} has no {name!r}", f"one of {', '.join(own)}" if own else "a class or function",
                          hint or f"--host module:{path}:{own[0] if own else 'NAME'}")  # fmt: skip
    if isinstance(found, nn.Module) or not callable(found):
        raise BadOption(f"{path}:{name} is a {type(found).__name__}", "a class, or a function that builds the module")
    return found  # type: ignore[no-any-return]


def _arguments(
    build: Callable[..., Any], name: str, text: str, outputs: int | None, input_shape: tuple[int, ...] | None, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """What to call `build` with, and what a user should know about it."""
    given = _parse(text)
    takes = inspect.signature(build).parameters
    named = {key: p for key, p in takes.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        for key in given:
            if key not in named:
                raise BadOption(f"{name} takes no argument {key!r}", ", ".join(named) or "no arguments",
                                did_you_mean(key, named))  # fmt: skip
    known: dict[str, Any] = dict.fromkeys(("outputs", "num_classes", "vocab_size"), outputs)
    known |= {"input_shape": input_shape, "seed": seed}
    known |= dict.fromkeys(
        ("in_channels", "in_chans"), input_shape[0] if input_shape and len(input_shape) == 3 else None
    )
    told = {key: known[key] for key in named if known.get(key) is not None and key not in given}
    missing = [key for key, p in named.items() if p.default is p.empty and key not in given and key not in told]
    if missing:
        raise BadOption(f"{name} needs {', '.join(missing)}", "a value for each argument without a default",
                        f'--set "module.args={",".join(f"{key}=…" for key in missing)}"')  # fmt: skip
    said = ", ".join(f"{key}={value}" for key, value in told.items() if key != "seed")
    return {**told, **given}, [f"{name} is built with {said}, as the task says"] if said else []


def _parse(text: str) -> dict[str, Any]:
    """`width=64,norm='batch'` as a mapping; values are literals of Python."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            raise ValueError("no arguments by name")
        return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise BadOption(f"module.args={text!r} cannot be read", "name=value,… with literals of Python",
                        "--set \"module.args=width=64,norm='batch'\"") from error  # fmt: skip


def _host(
    built: nn.Module, path: Path, name: str, outputs: int | None, shape: tuple[int, ...] | None, notes: list[str]
) -> ModuleHost:
    """The host, measured on noise of the task's shape: numbers, or whole numbers where the module takes tokens."""
    if shape is None:
        return host_from_module(built, notes=notes)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(1, *shape, generator=generator)
    tokens = torch.randint(0, max(1, outputs or 2), (1, *shape), generator=generator)
    tries = [numbers, tokens] if len(shape) == 1 else [numbers]
    if any(isinstance(part, nn.Embedding) for part in built.modules()):
        tries.reverse()
    first: EsperError | None = None
    for example in tries:
        try:
            return host_from_module(built, example=example, notes=notes)
        except EsperError as error:
            first = first or error
    assert first is not None
    given = first.given.replace("the example", f"examples of shape {tuple(shape)}")
    raise BadOption(f"{path.name}: {given}", f"a {name} for such examples", "another --task, or --set module.args=…")
