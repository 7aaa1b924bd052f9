"""Writes `report.html`: one self-contained file that shows a run and works offline."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from esper_core.leyline.errors import EsperError
from esper_core.leyline.files import make_temporary, refuse_links
from esper_core.nissa.report.reading import RunDigest

__all__ = ["render_report", "write_report"]


def write_report(run_folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run, finished or not.

    Args:
        run_folder: a folder with `events.jsonl` and `run.json`; `compare.json` is shown when there is one.
        out: where to write; `report.html` in the folder by default.

    Returns:
        The path of the report. It is written under a temporary name and renamed, so a reader never sees half of it.

    Raises:
        EsperError: the folder holds no run, or the report cannot be written there.
    """
    folder = Path(run_folder)
    if not (folder / "events.jsonl").is_file() and not (folder / "run.json").is_file():
        raise EsperError(f"{folder} holds no run", "a folder with run.json and events.jsonl", "esper runs list")
    refuse_links(folder)
    target = Path(out) if out is not None else folder / "report.html"
    partial: Path | None = None
    try:
        target = target / "report.html" if target.is_dir() else target
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = make_temporary(target)
        partial.write_text(render_report(RunDigest(folder).to_dict()), encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        shown = str(target) if len(str(target)) < 200 else f"{str(target)[:60]}… ({len(str(target))} characters)"
        raise EsperError(f"cannot write {shown}: {error.strerror}", "a writable place", "--out FILE") from error
    return target


def render_report(data: dict[str, Any]) -> str:
    """The page for `RunDigest.to_dict()`'s data.

    The data travel as JSON in which `<`, `>` and `&` are escaped, so that no text from a run can end the element
    that holds them; the script only ever sets text and attributes; and a content security policy allows this page's
    own script by its hash and nothing else.
    """
    template, style = (
        resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
        for name in ("template.html", "style.css")
    )
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    assert script is not None, "template.html holds one plain <script>"
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    parts = {
        "POLICY": policy,
        "TITLE": html.escape(f"{data['name']} · Esper report"),
        "STYLE": style,
        "DATA": _embed(data),
    }
    return re.sub("__(POLICY|TITLE|STYLE|DATA)__", lambda match: parts[match[1]], template)


def _embed(data: dict[str, Any]) -> str:
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
