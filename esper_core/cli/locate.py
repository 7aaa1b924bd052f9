"""Finds the definition of a part without importing it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path


def locate(reference: str) -> str:
    """`path:line` of `package.module:Name`; the reference itself where no source file can be found."""
    module, _, name = reference.partition(":")
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)  # a top-level module only: for others this would import their parents
    except ValueError:
        return reference
    if spec is None:
        return reference
    for root in spec.submodule_search_locations or ():
        base = Path(root).joinpath(*inner)
        for path in (base.with_name(base.name + ".py") if inner else base, base / "__init__.py"):
            if path.is_file():
                return _with_line(path, name)
    return _with_line(Path(spec.origin), name) if spec.origin and not inner else reference


def _with_line(path: Path, name: str) -> str:
    pattern = re.compile(rf"^(?:async\s+def|def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*[:=]")
    text = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = (number for number, line in enumerate(text, 1) if pattern.match(line))
    return f"{path}:{next(lines, 1)}"
