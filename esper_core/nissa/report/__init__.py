"""Writes `report.html`: one self-contained file that shows a run and works offline."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from esper_core.leyline.errors import EsperError
from esper_core.leyline.files import make_temporary, refuse_links
from esper_core.nissa.report.reading import RunDigest

__all__ = ["fill_template", "page_path", "render_report", "write_page", "write_report"]


def write_report(run_folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run, finished or not.

    Args:
        run_folder: a folder with `events.jsonl` and `run.json`; `compare.json` is shown when there is one.
        out: where to write; `report.html` in the folder by default.

    Returns:
        The path of the report.

    Raises:
        EsperError: the folder holds no run, or the report cannot be written there.
    """
    folder = Path(run_folder)
    if not (folder / "events.jsonl").is_file() and not (folder / "run.json").is_file():
        raise EsperError(f"{folder} holds no run", "a folder with run.json and events.jsonl", "esper runs list")
    refuse_links(folder)
    return write_page(
        page_path(folder if out is None else out, "report.html"), render_report(RunDigest(folder).to_dict())
    )


def page_path(target: str | Path, name: str) -> Path:
    """The file `target`, or `name` in it if it is a folder."""
    path = Path(target)
    try:
        return path / name if path.is_dir() else path
    except OSError:  # too long a name, which writing will tell
        return path


def write_page(target: Path, text: str) -> Path:
    """Write a page under a temporary name and rename it, so that a reader never sees half of it.

    Raises:
        EsperError: it cannot be written there.
    """
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = make_temporary(target)
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        if partial is not None:
            with suppress(OSError):  # the error that is told is the first
                partial.unlink(missing_ok=True)
        shown = str(target) if len(str(target)) < 200 else f"{str(target)[:60]}… ({len(str(target))} characters)"
        raise EsperError(
            f"cannot write {shown}: {error.strerror or error}", "a writable place", "--out FILE"
        ) from error
    return target


def render_report(data: dict[str, Any]) -> str:
    """The page for `RunDigest.to_dict()`'s data.

    The data travel as JSON in which `<`, `>` and `&` are escaped, so that no text from a run can end the element
    that holds them; the script only ever sets text and attributes; and a content security policy allows this page's
    own script by its hash and nothing else.
    """
    return fill_template("template.html", f"{data['name']} · Esper report", data)


def fill_template(name: str, title: str, data: Mapping[str, Any]) -> str:
    """A page of this package with its data, its style and its own script, which alone may run; see `render_report`."""
    template, style, shared = (
        resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
        for file in (name, "style.css", "shared.js")
    )
    template = template.replace("__SHARED__", shared)
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    assert script is not None, f"{name} holds one plain <script>"
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    parts = {"POLICY": policy, "TITLE": html.escape(title), "STYLE": style, "DATA": _embed(data)}
    return re.sub("__(POLICY|TITLE|STYLE|DATA)__", lambda match: parts[match[1]], template)


def _embed(data: Mapping[str, Any]) -> str:
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.encode("utf-8", errors="replace").decode("utf-8")  # lone surrogates cannot be written
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any, depth: int = 0) -> Any:
    """`value` with NaN, infinities and values deeper than 40 levels turned into text."""
    if isinstance(value, dict):
        return {str(k): _finite(v, depth + 1) for k, v in value.items()} if depth < 40 else "…"
    if isinstance(value, list):
        return [_finite(v, depth + 1) for v in value] if depth < 40 else "…"
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value
