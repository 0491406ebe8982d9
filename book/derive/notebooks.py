"""A page as the book shows it: the committed notebook with a line under its title about its run."""

from __future__ import annotations

import copy
import json
from typing import Any

from derive.markup import duration, tally, text
from derive.shelf import Page, Shelf, cell_source

RECORD_MIME = "application/vnd.minilib.record+json"


def staged(shelf: Shelf, page: Page) -> str:
    """The notebook's JSON for the book: record data dropped from the outputs, the strip set under the title."""
    notebook: dict[str, Any] = copy.deepcopy(dict(page.notebook or {}))
    cells = notebook["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            cell["outputs"] = [o for o in map(_without_record, cell["outputs"]) if o is not None]
    first = cells[0] if cells else None
    lines = cell_source(first).splitlines() if first else []
    if first is None or first["cell_type"] != "markdown" or not lines or not lines[0].startswith("# "):
        raise ValueError(
            f"{page.docname}.py: the first cell must be Markdown and begin with the page's title: # Title"
        )
    first["source"] = "\n".join([lines[0], "", strip(shelf, page), *lines[1:]])
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def _without_record(output: dict[str, Any]) -> dict[str, Any] | None:
    """The output without the record's data, which browsers cannot show; None where nothing else is in it."""
    data = output.get("data")
    if data is None or RECORD_MIME not in data:
        return output
    rest = {mime: value for mime, value in data.items() if mime != RECORD_MIME}
    return {**output, "data": rest} if rest else None


def strip(shelf: Shelf, page: Page) -> str:
    """The line under a page's title: Colab link, verdict counts, which run; and a note where the library has changed since."""
    root = "../../"
    parts = [f'<a class="colab-badge" href="{shelf.colab(page)}">Open in Colab</a>']
    parts.append(f'<a class="strip-verdicts" href="{root}results.html#{page.card.slug}">{tally(page)}</a>')
    if page.record is not None:
        parts.append(f'<span class="strip-run">{run_line(page)}</span>')
    lines = [f'<div class="page-strip">{" ".join(parts)}</div>', ""]
    if page.shown in page.drifted:
        lines += [
            ":::{admonition} The library has changed since this run",
            ":class: note library-changed",
            "The numbers below come from the run named above. Parts of minilib that it used were edited later. "
            "Running the page again shows whether that matters.",
            ":::",
            "",
        ]
    return "\n".join(lines)


def run_line(page: Page) -> str:
    """Profile, date and duration of the shown run."""
    record = page.record or {}
    wall = f", {duration(record['wall_s'])}" if record.get("wall_s") else ""
    return text(f"{record['profile']} run of {record['date'][:10]}{wall}")
