"""Table of contents, bibliography, part pages: all from the cards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from derive.markup import page_cards
from derive.shelf import Page, Shelf

# The hand-written pages, by their place around the parts.
BEFORE = {"Start here": ("how-to-read-a-verdict", "conventions"), "Results": ("results", "performance")}
AFTER = {"Taking part": ("add-a-paper", "references")}
ROOT = "intro"


def hand_written() -> set[str]:
    """Names of the pages that are written by hand, part introductions apart."""
    return {ROOT, *(name for group in (BEFORE, AFTER) for names in group.values() for name in names)}


def check_hand_written(book: Path) -> None:
    """Refuse a page in book/ that no contents list has, and a listed one that is not there."""
    there = {path.stem for path in book.glob("*.md")}
    for name in sorted(there ^ hand_written()):
        place = (
            "derive/contents.py lists it, but it is missing"
            if name not in there
            else "add it to derive/contents.py"
        )
        raise ValueError(f"book/{name}.md: {place}")


def toc(shelf: Shelf) -> str:
    """Jupyter Book's ``_toc.yml``: parts in the order of their folders, pages in the order of their cards."""
    chapters = [
        {"file": f"parts/{part}", "sections": [{"file": page.docname} for page in shelf.readable(part)]}
        for part in shelf.parts
    ]
    groups: list[dict[str, Any]] = [_group(caption, names) for caption, names in BEFORE.items()]
    if chapters:
        groups.append({"caption": "Pages", "numbered": 2, "chapters": chapters})
    groups += [_group(caption, names) for caption, names in AFTER.items()]
    return yaml.safe_dump({"format": "jb-book", "root": ROOT, "parts": groups}, sort_keys=False)


def _group(caption: str, names: tuple[str, ...]) -> dict[str, Any]:
    return {"caption": caption, "chapters": [{"file": name} for name in names]}


def part_page(shelf: Shelf, part: str) -> str:
    """A part's introduction followed by cards of its pages."""
    text = (shelf.root / "book" / "parts" / f"{part}.md").read_text(encoding="utf-8").rstrip()
    # A heading here would be numbered, and the part's pages would count on from it.
    return f"{text}\n\n:::{{rubric}} Pages\n:::\n\n{page_cards(shelf, part, '../')}"


def bibliography(shelf: Shelf) -> str:
    """The cards' papers, keyed by slug, and the further works of book/references.bib. A work given twice is refused."""
    path = shelf.root / "book" / "references.bib"
    further = path.read_text(encoding="utf-8")
    keys = re.findall(r"^\s*@\w+\{\s*([^,\s]+)", further, flags=re.MULTILINE)
    eprints = set(re.findall(r"^\s*eprint\s*=\s*[{\"]([^}\"]+)", further, flags=re.MULTILINE))
    slugs = {page.card.slug: page for page in shelf.pages}
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"book/references.bib: the key {key!r} is there twice; remove one")
        if key in slugs:
            raise ValueError(
                f"book/references.bib: {key!r} is the key of reproductions/{key}/paper.toml; remove it"
            )
    for page in shelf.pages:
        if page.card.arxiv in eprints:
            raise ValueError(
                f"book/references.bib: arXiv {page.card.arxiv} has a card; remove the entry and cite {page.card.slug!r}"
            )
    return "\n".join([*(_entry(page) for page in shelf.pages if page.card.authors), further])


def _entry(page: Page) -> str:
    card = page.card
    # The second pair of braces keeps capitals; characters that mean something to TeX are escaped.
    fields: Mapping[str, str] = {
        "title": "{" + _tex(card.title) + "}",
        "author": " and ".join(_tex(name) for name in card.authors),
        "year": str(card.year or ""),
    }
    if card.arxiv:
        fields = {**fields, "eprint": card.arxiv, "archiveprefix": "arXiv"}
    body = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items() if value)
    return f"@misc{{{card.slug},\n{body}\n}}\n"


def _tex(value: str) -> str:
    return re.sub(r"([&%$#_])", r"\\\1", value)
