"""The pages there are: each card with its executed notebook and its records."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilib.cards import Card, all_cards
from minilib.consistency import drifted

NOT_RUN = "not run yet"
PUBLISHED = ("cpu", "gpu")  # profiles whose records are committed


@dataclass(frozen=True)
class Page:
    """A card, its executed notebook (None before the first run) and its records by profile."""

    card: Card
    notebook: Mapping[str, Any] | None
    records: Mapping[str, Mapping[str, Any]]
    drifted: frozenset[str] = frozenset()  # profiles whose record was made with another library than today's
    shown: str = "cpu"  # the profile whose outputs the notebook carries

    @property
    def docname(self) -> str:
        """Path of the page in the book, without extension."""
        return f"notebooks/{self.card.part}/{self.card.slug}"

    @property
    def title(self) -> str:
        """The page's own title: the first level-one heading of its notebook, else the paper's title."""
        for cell in (self.notebook or {}).get("cells", []):
            for line in cell_source(cell).splitlines() if cell["cell_type"] == "markdown" else ():
                if line.startswith("# "):
                    return line[2:].strip()
        return self.card.title

    @property
    def record(self) -> Mapping[str, Any] | None:
        """The record that the page's outputs come from, if there is one."""
        return self.records.get(self.shown)

    def verdicts(self) -> dict[str, str]:
        """Verdict of every claim in the shown record; "not run yet" where there is no run of the page."""
        done = self.record["claims"] if self.record is not None else {}
        missing = {c.id: "not tried" if c.not_tried is not None else NOT_RUN for c in self.card.claims}
        return {claim: done[claim]["verdict"] if claim in done else missing[claim] for claim in missing}


@dataclass(frozen=True)
class Shelf:
    """Everything the book is derived from."""

    root: Path
    url: str  # of the repository, without a slash at the end
    branch: str
    pages: tuple[Page, ...]  # of every card, in the book's order
    parts: Mapping[str, str] = field(default_factory=dict)  # folder -> title, of the parts that have a page

    def readable(self, part: str | None = None) -> list[Page]:
        """Pages that have been executed, of one part or of all."""
        return [p for p in self.pages if p.notebook is not None and part in (None, p.card.part)]

    def colab(self, page: Page) -> str:
        """Address that opens the page's notebook in Colab."""
        repository = self.url.removeprefix("https://github.com/")
        return (
            f"https://colab.research.google.com/github/{repository}/blob/{self.branch}/{page.docname}.ipynb"
        )


def cell_source(cell: Mapping[str, Any]) -> str:
    """Source of a notebook cell, which the format stores as a string or as a list of lines."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def read_shelf(root: Path, results: Path | None = None, shown: str = "cpu") -> Shelf:
    """Read all cards, notebooks and records of a checkout.

    ``results`` is a folder of fresh runs, ``<slug>.ipynb`` with ``<slug>.json``: they are shown in place of the committed
    ones. Raises ValueError when pyproject.toml names no repository or a part with pages has no introduction.
    """
    url, branch = _repository(root)
    pages = tuple(_page(card, root, results, shown) for card in all_cards(root))
    parts = sorted({page.card.part for page in pages if page.notebook is not None})
    return Shelf(root, url, branch, pages, {part: _part_title(root, part) for part in parts})


def _page(card: Card, root: Path, results: Path | None, shown: str) -> Page:
    folder = root / "reproductions" / card.slug
    files = {profile: folder / f"{profile}.json" for profile in PUBLISHED}
    notebook = root / card.notebook
    if results is not None and (results / f"{card.slug}.ipynb").is_file():
        notebook = results / f"{card.slug}.ipynb"
        fresh = results / f"{card.slug}.json"
        shown = _read_json(fresh)["profile"]
        files[shown] = fresh
    records = {profile: _read_json(path) for profile, path in files.items() if path.is_file()}
    changed = frozenset(profile for profile, record in records.items() if drifted(record))
    return Page(card, _read_json(notebook) if notebook.is_file() else None, records, changed, shown)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); run the page again: make page SLUG={path.stem}"
        ) from None


def _repository(root: Path) -> tuple[str, str]:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    urls = {name.lower(): url for name, url in project.get("urls", {}).items()}
    if "repository" not in urls:
        raise ValueError(
            'pyproject.toml: [project.urls] has no Repository; add Repository = "https://github.com/OWNER/NAME"'
        )
    return urls["repository"].rstrip("/"), "main"


def _part_title(root: Path, part: str) -> str:
    path = root / "book" / "parts" / f"{part}.md"
    if not path.is_file():
        raise ValueError(
            f"book/parts/{part}.md is missing, but the part has a page; add it: a title and an introduction"
        )
    first = path.read_text(encoding="utf-8").lstrip().splitlines()[:1]
    if not first or not first[0].startswith("# "):
        raise ValueError(f"book/parts/{part}.md must begin with its title: # The part's title")
    return first[0][2:].strip()
