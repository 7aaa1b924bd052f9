"""Runs the notebooks and writes each as a page of the site: `python docs/notebooks/execute.py`.

The files `NAME.ipynb` hold no outputs; `notebook-NAME.md` in `docs/` holds what their cells answered.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    return notebook


def page(notebook: nbformat.NotebookNode, name: str) -> str:
    """The notebook as Markdown: code in fences, text outputs in fences, HTML as it is."""
    parts = ["<!-- Written by docs/notebooks/execute.py; change the notebook, then run it again. -->"]
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            if number == 0:
                parts.append(f"The notebook is `docs/notebooks/{name}.ipynb`; this page shows what its cells answered.")
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            if output.get("name") == "stderr":  # warnings of libraries about the machine at hand
                continue
            data = output.get("data", {})
            text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
            parts.append(" ".join(data["text/html"].split()) if "text/html" in data else f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    for file in sorted(HERE.glob("*.ipynb")):
        (HERE.parent / f"notebook-{file.stem}.md").write_text(page(execute(file), file.stem), encoding="utf-8")
