"""Do cards, page texts, notebooks and records agree? What cannot be recomputed from the others is a problem, named.

A library that changed since a record was made is a note: the book says so, and nothing fails.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilib import pages
from minilib.cards import PROFILES, Card, all_cards
from minilib.execution import checkout, page_text
from minilib.keys import library_key, page_key
from minilib.verdicts import summarise

REQUIRED = (
    "settings",
    "wall_s",
    "peak_mb",
    "threads",
    "machine",
    "versions",
    "date",
    "device",
    "modules",
    "zoo",
)


def read_record(path: Path) -> dict[str, Any]:
    """A record file."""
    return json.loads(path.read_text(encoding="utf-8"))


def is_current(record: Mapping[str, Any], card: Card, text: str) -> bool:
    """Whether a record belongs to this text, this card and this library."""
    return belongs(record, card, text) and not drifted(record)


def belongs(record: Mapping[str, Any], card: Card, text: str) -> bool:
    """Whether a record was made by this page: same code, claims and settings."""
    return record.get("page_key") == page_key(text, card, record.get("settings", {}))


def drifted(record: Mapping[str, Any]) -> bool:
    """Whether code, constraints or checkpoints that a record was made with have changed since."""
    return record.get("library_key") != library_key(record.get("modules", ()), record.get("zoo", {}))


def same_number(left: Any, right: Any) -> bool:
    """Whether two entries of a record agree, numbers to a relative 1e-9 (versions of scipy differ in the last digits)."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_number, left, right))
    if isinstance(left, int | float) and isinstance(right, int | float):
        return math.isclose(left, right, rel_tol=1e-9)
    return left == right


def record_problems(record: Mapping[str, Any], card: Card, profile: str, text: str) -> list[str]:
    """What in a record contradicts its card or its page."""
    name = f"{card.slug}/{profile}.json"
    if (record.get("slug"), record.get("profile")) != (card.slug, profile):
        return [f"{name}: it says slug {record.get('slug')!r}, profile {record.get('profile')!r}"]
    found = [f"{name}: `{key}` is missing; run the page again" for key in REQUIRED if key not in record]
    if not isinstance(record.get("wall_s"), int | float) or not record["wall_s"] > 0:
        found.append(f"{name}: no wall time, so it did not really run")
    if not belongs(record, card, text):
        found.append(
            f"{name}: page_key does not match the page's code, claims and settings; run the page again"
        )
    claims = record.get("claims", {})
    if set(claims) != {claim.id for claim in card.claims}:
        return [*found, f"{name}: its claims {list(claims)} are not the card's; run the page again"]
    for claim in card.claims:
        entry, fresh = claims[claim.id], summarise(claim, claims[claim.id]["values"])
        for key, value in fresh.items():
            if not same_number(entry.get(key), value):
                found.append(f"{name}: {claim.id}: `{key}` is {entry.get(key)}, recomputed {value}")
        if "not_tried" in entry:
            found.append(f"{name}: {claim.id}: {untried(entry)}")
        elif profile in (claim.asserted_in or ()) and len(entry["values"]) < claim.seeds:
            found.append(
                f"{name}: {claim.id}: {len(entry['values'])} values, the card asks for {claim.seeds}"
            )
        if claim.kind == "exact" and fresh["verdict"] == "contradicted":
            found.append(f"{name}: {claim.id}: an exact claim does not hold")
    return found


def untried(entry: Mapping[str, Any]) -> str:
    """Why a run that could not try a claim is not published."""
    return f"that run could not try it ({entry['not_tried']}); run the page where it can be tried"


def page_problems(card: Card, root: Path) -> list[str]:
    """What is wrong with one page: text, committed notebook, records."""
    try:
        text = page_text(card, root)
    except pages.PageError as error:
        return [str(error)]
    notebook_path, record_path = root / card.notebook, root / "reproductions" / card.slug / "cpu.json"
    absent = [path for path in (notebook_path, record_path) if not path.is_file()]
    if absent:
        remedy = f"run: make page SLUG={card.slug} PROFILE=cpu"
        return [f"{path.relative_to(root)}: does not exist; {remedy}" for path in absent]
    notebook, record = pages.read_notebook(notebook_path), read_record(record_path)
    found = text_problems(card, text, notebook) + record_problems(record, card, "cpu", text)
    found += [f"{card.notebook}: {reason}; run the page again" for reason in pages.never_ran(notebook)]
    try:
        if pages.embedded_record(notebook) != record:
            found.append(f"{card.notebook}: the record in it is not {record_path.name}; run the page again")
    except pages.PageError as error:
        found.append(f"{card.notebook}: {error}")
    gpu = record_path.with_name("gpu.json")
    return found + (record_problems(read_record(gpu), card, "gpu", text) if gpu.is_file() else [])


def text_problems(card: Card, text: str, notebook: Any) -> list[str]:
    """Where a committed notebook and its text differ, or hold what a page must not."""
    found = []
    fresh = pages.notebook_of(text)
    if pages.contents(fresh) != pages.contents(notebook):
        found.append(
            f"{card.notebook}: its cells differ from {card.text}; run: python -m minilib.publish sync {card.slug}"
        )
    if dict(notebook.metadata) != dict(fresh.metadata):
        found.append(
            f"{card.notebook}: its metadata is not what pages carry; run: python -m minilib.publish sync"
        )
    skips = ("NBVAL_SKIP", "NBVAL_RAISES_EXCEPTION")
    tags = {tag for cell in fresh.cells for tag in cell.metadata.get("tags", [])}
    for mark in skips:
        if mark.lower().replace("_", "-") in tags or f"# {mark}" in text:
            found.append(f"{card.text}: {mark} would keep a cell from being checked; remove it")
    return found


def check(root: str | Path | None = None) -> tuple[list[str], list[str]]:
    """Problems, and notes, over all cards. No problem means that the repository is consistent."""
    root = checkout(root)
    cards = all_cards(root)
    problems, notes = [], []
    for card in cards:
        problems += page_problems(card, root)
        for profile in ("cpu", "gpu"):
            path = root / "reproductions" / card.slug / f"{profile}.json"
            if path.is_file() and drifted(read_record(path)):
                notes.append(f"{card.slug}/{profile}.json: the library has changed since")
    known = {card.text for card in cards} | {card.notebook for card in cards}
    for path in sorted(root.glob("notebooks/*/*.*")):
        relative = path.relative_to(root).as_posix()
        if path.suffix in (".py", ".ipynb") and relative not in known:
            problems.append(
                f"{relative}: belongs to no card; write reproductions/{path.stem}/paper.toml or remove it"
            )
    allowed = {"paper.toml", *(f"{profile}.json" for profile in PROFILES if profile != "smoke")}
    for path in sorted(root.glob("reproductions/*/*")):
        if path.name not in allowed or not path.with_name("paper.toml").is_file():
            problems.append(f"{path.relative_to(root)}: not a card or a record of one; remove it")
    return problems, notes


def receipt_problems(
    folder: str | Path, since: float, profile: str = "smoke", root: str | Path | None = None
) -> list[str]:
    """Which pages did not really run since a moment (seconds of the epoch), judged by the receipts they left."""
    found = []
    for card in all_cards(root):
        path = Path(folder) / f"{card.slug}.json"
        if not path.is_file():
            found.append(f"{card.slug}: no receipt in {folder}: its page did not run to its report")
            continue
        receipt = read_record(path)
        if receipt.get("profile") != profile:
            found.append(f"{card.slug}: ran in profile {receipt.get('profile')!r}, expected {profile!r}")
        if not (receipt.get("wall_s") or 0) > 0:
            found.append(f"{card.slug}: its receipt has no wall time")
        if not (receipt.get("started") or 0) >= since:
            when = datetime.datetime.fromtimestamp(receipt.get("started") or 0, datetime.UTC)
            found.append(
                f"{card.slug}: its receipt is of {when:%Y-%m-%d %H:%M:%S} UTC, before this run began"
            )
    return found
