"""The whole source of the book as files in memory: what is written by hand and what is derived."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import yaml

from derive import contents, example, notebooks, performance, results
from derive.markup import page_cards
from derive.shelf import Shelf

_MARKER = re.compile(r"<!-- derived: ([\w-]+) -->")


def stage(shelf: Shelf) -> dict[str, bytes]:
    """Path in the book's source folder -> content, for everything that Jupyter Book is given."""
    book = shelf.root / "book"
    contents.check_hand_written(book)
    blocks = {
        "page-cards": page_cards(shelf),
        "summary": results.summary(shelf),
        "results": results.table(shelf),
        "worked-example": example.table(),
        "performance": performance.table(shelf.root),
    }
    files: dict[str, str] = {
        f"{name}.md": fill((book / f"{name}.md").read_text(encoding="utf-8"), blocks, f"book/{name}.md")
        for name in sorted(contents.hand_written())
    }
    files |= {f"parts/{part}.md": contents.part_page(shelf, part) for part in shelf.parts}
    files |= {f"{page.docname}.ipynb": notebooks.staged(shelf, page) for page in shelf.readable()}
    files |= {
        "_toc.yml": contents.toc(shelf),
        "references.bib": contents.bibliography(shelf),
        "_config.yml": config(shelf),
    }
    static = {
        str(path.relative_to(book)): path.read_bytes()
        for path in sorted((book / "_static").rglob("*"))
        if path.is_file()
    }
    return (
        {name: value.encode() for name, value in files.items()}
        | static
        | mathjax()
        | {"_extra/.nojekyll": b""}
    )


def fill(text: str, blocks: dict[str, str], where: str) -> str:
    """Replace ``<!-- derived: name -->`` by the block of that name; an unknown name is refused."""

    def block(match: re.Match[str]) -> str:
        if match[1] not in blocks:
            raise ValueError(
                f"{where}: unknown derived block {match[1]!r}; known: {', '.join(sorted(blocks))}"
            )
        return blocks[match[1]]

    return _MARKER.sub(block, text)


def config(shelf: Shelf) -> str:
    """book/_config.yml with the repository's address."""
    settings = yaml.safe_load((shelf.root / "book" / "_config.yml").read_text(encoding="utf-8"))
    settings["repository"] = {"url": shelf.url, "branch": shelf.branch, "path_to_book": ""}
    return yaml.safe_dump(settings, sort_keys=False)


def mathjax() -> dict[str, bytes]:
    """The files of MathJax that pages load, for the site's _static folder: one script and its fonts."""
    # The package's name has hyphens, so it is found rather than imported.
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if spec is None or spec.origin is None:
        raise ValueError(
            "sphinx-mathjax-offline is not installed; install the book extra: pip install -e '.[book]'"
        )
    source = Path(spec.origin).parent / "static" / "mathjax"
    wanted = [source / "tex-chtml-full.js", *sorted((source / "output" / "chtml" / "fonts").rglob("*.woff"))]
    return {f"_extra/_static/mathjax/{path.relative_to(source)}": path.read_bytes() for path in wanted}
