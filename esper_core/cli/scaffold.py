"""`esper plugins new NAME`: a package that passes its own tests as it is."""

from __future__ import annotations

import keyword
import re
import textwrap
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Final

import attrs

from esper_core import __version__
from esper_core.leyline.errors import BadOption, EsperError, os_error_as
from esper_core.leyline.specs import API_VERSION, SPEC_KINDS

_NAME: Final = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_LONGEST: Final = 64
_SPECS: Final = {spec.kind: spec for spec in SPEC_KINDS}
_CONFORMANCE: Final = {"blend": "CombinationConformance"}
_OWN_TESTS: Final = {"objective": "objective/test.py"}


@attrs.frozen
class Scaffold:
    """Names of a new package.

    Attributes:
        distribution: `esper-glow`. module: `esper_glow`. part: `glow`. kind: `blueprint`.
    """

    distribution: str
    module: str
    part: str
    kind: str

    @classmethod
    def named(cls, name: str, kind: str) -> Scaffold:
        """The names that follow from NAME, with or without `esper-` before it.

        Raises:
            BadOption: no name of a package, or one that would hide a module that is there.
        """
        if not _NAME.fullmatch(name) or len(name) > _LONGEST:
            shown = name if len(name) <= _LONGEST else f"{name[:40]}… ({len(name)} characters)"
            raise BadOption(
                f"{shown!r} cannot name a package",
                f"at most {_LONGEST} lower-case letters, digits and '-'",
                "esper plugins new glow",
            )
        bare = name.removeprefix("esper-").replace("-", "_")
        dashed = bare.replace("_", "-")
        if find_spec(f"esper_{bare}") or keyword.iskeyword(bare) or bare == "plugin":
            raise BadOption(f"{name!r} cannot name a package: it is taken", "another name", "esper plugins new glow")
        return cls(f"esper-{dashed}", f"esper_{bare}", bare, kind)

    def write(self, parent: Path) -> list[Path]:
        """Write the package into `parent/distribution`.

        Raises:
            EsperError: something is there already, or it cannot be written.
        """
        root = parent / self.distribution
        if root.exists() and any(root.iterdir()):
            raise EsperError(f"{root} is not empty", "a new folder", f"esper plugins new {self.part} --into FOLDER")
        written = []
        with os_error_as(EsperError, f"{root} cannot be written", "a folder that may be written to"):
            for path, text in self.files().items():
                target = root / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
                written.append(target)
        return written

    def files(self) -> dict[str, str]:
        """Path within the package to text."""
        source = f"src/{self.module}"
        return {
            "pyproject.toml": self._fill("common/pyproject.toml"),
            "README.md": self._fill("common/README.md"),
            f"{source}/__init__.py": f'"""{self.part}: a {self.kind} for Esper."""\n',
            f"{source}/py.typed": "",
            f"{source}/plugin.py": self._fill("common/plugin.py"),
            f"{source}/{self.part}.py": self._fill(f"{self.kind}/part.py"),
            f"tests/test_{self.part}.py": self._fill(_OWN_TESTS.get(self.kind, "common/test.py")),
        }

    def _class(self) -> str:
        """A name for what the part's module defines, unless the module needs that name for something else."""
        name = "".join(word.capitalize() for word in self.part.split("_"))
        taken = re.search(rf"\b{name}\b", _read(f"{self.kind}/part.py"))
        return name + self.kind.capitalize() if taken else name

    def _fill(self, template: str) -> str:
        spec = _SPECS[self.kind]
        words = {
            "distribution": self.distribution,
            "module": self.module,
            "part": self.part,
            "kind": self.kind,
            "plugin": self.distribution.removeprefix("esper-"),
            "core": ".".join(__version__.split(".")[:2]),
            "Class": self._class(),
            "api": str(API_VERSION),
            "Spec": spec.__name__,
            "Conformance": _CONFORMANCE.get(self.kind, f"{self.kind.capitalize()}Conformance"),
            "example": _example(self.kind, self.part),
        }
        fields = Template(_read(f"{self.kind}/fields")).substitute(words)
        words["fields"] = textwrap.indent(fields.rstrip("\n"), " " * 12)
        return Template(_read(template)).substitute(words)


def _read(template: str) -> str:
    return (resources.files("esper_core.cli") / "templates" / f"{template}.tmpl").read_text(encoding="utf-8")


def _example(kind: str, part: str) -> str:
    use = {
        "host": f"esper run --host {part}",
        "adapter": f"esper tamiyo adapt --kind {part} --domain language",
        "task": f"esper run --host mlp --task {part}",
        "controller": f"esper run --host cnn --controller {part}",
        "objective": f"esper run --host mlp --task diabetes --objective {part}",
        "reward": f"esper run --host cnn --rewards accuracy=1,{part}=1",
    }
    return use.get(kind, f"esper run --host cnn --{kind}s {part}")
