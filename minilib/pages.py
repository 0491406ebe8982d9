"""A page in its two forms: the text people edit (py:percent) and the notebook that was executed.

The notebook follows from the text alone: same cells, ids made from their contents, fixed metadata. Outputs are added by a
run, or kept from the last run for cells whose code did not change.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilib.keys import strip_prose
from minilib.reproduction import MIME

# Colab reads `accelerator` and opens the page on a GPU, where profile "auto" means gpu.
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class PageError(ValueError):
    """A page that cannot be used; the message says what is wrong with it and what to do."""


def notebook_of(text: str) -> Any:
    """The notebook of a page's text, without outputs. The same text always gives the same notebook, ids included."""
    import jupytext
    from nbformat import v4

    parsed = jupytext.reads(text, fmt="py:percent")
    seen: Counter[str] = Counter()
    cells = []
    for cell in parsed.cells:
        source = cell.source.strip("\n")
        if not source:
            continue
        digest = hashlib.sha256(f"{cell.cell_type}\n{source}".encode()).hexdigest()[:12]
        seen[digest] += 1
        new = {"code": v4.new_code_cell, "markdown": v4.new_markdown_cell}.get(
            cell.cell_type, v4.new_raw_cell
        )
        cell_id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        cells.append(new(source, id=cell_id, metadata=cell.metadata))
    return v4.new_notebook(cells=cells, metadata=copy.deepcopy(METADATA))


def code(notebook: Any) -> list[Any]:
    """The code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def contents(notebook: Any) -> list[tuple[str, str, str, dict[str, Any]]]:
    """What the text decides of each cell: id, type, source and metadata. Equal lists mean equal pages."""
    return [(cell.id, cell.cell_type, cell.source, dict(cell.metadata)) for cell in notebook.cells]


def with_outputs(fresh: Any, executed: Any) -> Any:
    """``fresh`` with the outputs of those cells of ``executed`` whose code is the same but for comments."""
    result = copy.deepcopy(fresh)
    new, old = code(result), code(executed)
    keys = [[strip_prose(cell.source) for cell in cells] for cells in (new, old)]
    matcher = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False)
    for block in matcher.get_matching_blocks():
        for i in range(block.size):
            cell = new[block.a + i]
            cell.outputs = clean_outputs(old[block.b + i].outputs)
            cell.execution_count = old[block.b + i].execution_count
    return result


def clean_outputs(outputs: list[Any]) -> list[Any]:
    """Outputs as published: without stderr, neighbouring prints as one, without what only a viewer needs."""
    cleaned: list[Any] = []
    for output in copy.deepcopy(outputs):
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if cleaned and cleaned[-1].output_type == "stream":
                cleaned[-1].text += output.text
                continue
        output.pop("transient", None)
        cleaned.append(output)
    return cleaned


def never_ran(notebook: Any) -> list[str]:
    """Reasons why a notebook cannot count as executed; an empty list if it can."""
    problems = []
    for number, cell in enumerate(code(notebook), 1):
        if cell.execution_count is None:
            problems.append(f"code cell {number} has no execution count")
        problems += [
            f"code cell {number} ended in {output.ename}"
            for output in cell.outputs
            if output.output_type == "error"
        ]
    if not any(cell.outputs for cell in code(notebook)):
        problems.append("no cell has an output")
    return problems


def embedded_record(notebook: Any) -> dict[str, Any]:
    """The record that ``report()`` left in a notebook; there must be exactly one."""
    found = [out.data[MIME] for cell in code(notebook) for out in cell.outputs if MIME in out.get("data", {})]
    if len(found) != 1:
        raise PageError(f"the notebook holds {len(found)} records; run.report() must be called exactly once")
    return _plain(found[0])


def embed_record(notebook: Any, record: Mapping[str, Any]) -> None:
    """Replace the record in a notebook, in place."""
    for cell in code(notebook):
        for output in cell.outputs:
            if MIME in output.get("data", {}):
                output.data[MIME] = dict(record)


def _plain(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(value) for value in node] if isinstance(node, list) else node


def read_notebook(path: str | Path) -> Any:
    """A notebook file, as nbformat 4."""
    import nbformat

    return nbformat.read(path, as_version=4)


def dump_notebook(notebook: Any) -> str:
    """A notebook as the text of its file; refuses one that breaks the format."""
    import nbformat

    nbformat.validate(notebook)
    return nbformat.writes(notebook, version=4) + "\n"
