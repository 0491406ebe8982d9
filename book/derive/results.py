"""The results page: every claim of every card beside what came out here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from derive.markup import (
    ALL_VERDICTS,
    SIGNS,
    chip,
    duration,
    interval_plot,
    raw,
    slug,
    text,
    threshold,
)
from derive.shelf import NOT_RUN, Page, Shelf
from minilib.cards import Claim
from minilib.tables import number

HEADS = ("Paper and claim", "The paper says", "Here", "Threshold", "Verdict", "Run")


class Row(NamedTuple):
    """One line of the table; without a record where no run has a value for the claim."""

    page: Page
    claim: Claim
    verdict: str
    record: Mapping[str, Any] | None


def rows(shelf: Shelf) -> list[Row]:
    """A line for each claim and each profile in which it was recorded; one line for a claim without any record."""
    return [row for page in shelf.pages for claim in page.card.claims for row in _claim_rows(page, claim)]


def _claim_rows(page: Page, claim: Claim) -> Iterator[Row]:
    entries = [(record["claims"].get(claim.id), record) for record in page.records.values()]
    measured = [(entry, record) for entry, record in entries if entry is not None and entry["values"]]
    for entry, record in measured:
        yield Row(page, claim, entry["verdict"], record)
    if not measured:
        untried = claim.not_tried is not None or bool(entries)
        yield Row(page, claim, "not tried" if untried else NOT_RUN, None)


def summary(shelf: Shelf) -> str:
    """Counts over all claims, as a line of labels."""
    counts = Counter(row.verdict for row in rows(shelf))
    claims = sum(len(page.card.claims) for page in shelf.pages)
    papers = f"{len(shelf.readable())} of {len(shelf.pages)} pages run, {claims} claims"
    chips = " ".join(chip(v, counts[v]) for v in ALL_VERDICTS if counts[v])
    return raw(f'<p class="summary-line"><span class="summary-count">{papers}</span> {chips}</p>')


def table(shelf: Shelf) -> str:
    """The filterable table. Without JavaScript the controls stay hidden and the whole table is there."""
    lines = rows(shelf)
    if not lines:
        return raw('<p class="empty">There is no card yet.</p>')
    seen: set[str] = set()
    body = []
    for row in lines:
        # The page's own line about its run links to the first of its claims.
        anchor = "" if row.page.card.slug in seen else f' id="{row.page.card.slug}"'
        seen.add(row.page.card.slug)
        body.append(_row(row, anchor))
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    markup = (
        f'<div class="dashboard" data-dashboard>{_controls(shelf, lines)}'
        f'<table class="results"><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )
    return raw(markup)


def _controls(shelf: Shelf, lines: list[Row]) -> str:
    counts = Counter(row.verdict for row in lines)
    buttons = "".join(
        f'<button type="button" class="verdict verdict-{slug(v)}" data-filter-verdict="{slug(v)}" aria-pressed="false">'
        f'<span aria-hidden="true">{SIGNS[v]}</span> {counts[v]} {v}</button>'
        for v in ALL_VERDICTS
        if counts[v]
    )
    parts = sorted({row.page.card.part for row in lines})
    options = "".join(
        f'<option value="{p}">{text(shelf.parts.get(p, p[3:].capitalize()))}</option>' for p in parts
    )
    return (
        '<div class="controls" data-controls hidden>'
        '<input type="search" data-filter-text placeholder="Filter claims and papers" aria-label="Filter claims and papers">'
        f'<select data-filter-part aria-label="Part"><option value="">All parts</option>{options}</select>'
        f'<div class="verdict-buttons" role="group" aria-label="Verdicts">{buttons}</div>'
        '<p class="shown-count" data-shown-count aria-live="polite"></p></div>'
    )


def _row(row: Row, anchor: str) -> str:
    page, claim, verdict, record = row
    order = ALL_VERDICTS.index(verdict)
    cells = (
        (_claim_cell(page, claim), f"{page.card.part}/{page.card.slug}"),
        (text(claim.paper), ""),
        (_here(claim, record), number_key(claim, record)),
        (_threshold_cell(page, claim), ""),
        (chip(verdict), str(order)),
        (_run_cell(page, record), (record or {}).get("date", "")),
    )
    heads = zip(HEADS, cells, strict=True)
    inner = "".join(
        f'<td data-label="{head}" data-sort="{text(key)}">{cell}</td>' for head, (cell, key) in heads
    )
    tags = f'data-verdict="{slug(verdict)}" data-part="{page.card.part}"'
    return f"<tr{anchor} {tags}>{inner}</tr>"


def number_key(claim: Claim, record: Mapping[str, Any] | None) -> str:
    """What a line is sorted by in the column of results: the mean."""
    mean = record["claims"][claim.id]["mean"] if record is not None else None
    return "" if mean is None else repr(float(mean))


def _claim_cell(page: Page, claim: Claim) -> str:
    title = text(page.title)
    name = f'<a href="{page.docname}.html">{title}</a>' if page.notebook is not None else title
    return (
        f'<span class="row-page">{name}</span><span class="row-claim">{text(claim.statement)}</span>'
        f'<span class="row-note">{claim.kind}{": " + text(claim.metric) if claim.metric else ""}</span>'
    )


def _here(claim: Claim, record: Mapping[str, Any] | None) -> str:
    if record is None:
        return f'<span class="row-note">{text(claim.not_tried or NOT_RUN)}</span>'
    result = record["claims"][claim.id]
    seeds = len(result["values"])
    value = f'<span class="row-value">{number(result["mean"])}</span>'
    if result.get("interval"):
        low, high = result["interval"]
        value += f' <span class="row-interval">[{number(low)}, {number(high)}]</span>'
    note = (
        f'<span class="row-note">{seeds} seed{"s" if seeds > 1 else ""}</span>'
        if claim.kind != "exact"
        else ""
    )
    return f"{value}{interval_plot(claim, result)}{note}"


def _threshold_cell(page: Page, claim: Claim) -> str:
    if claim.threshold is None:
        return ""
    null = "" if claim.null is None else f'<span class="row-note">no effect: {number(claim.null)}</span>'
    changes = [a for a in page.card.amendments if a.claim == claim.id]
    amended = "".join(
        f'<span class="row-note amended">amended {a.date}: {text(a.change)} ({text(a.reason)})</span>'
        for a in changes
    )
    return f'<span class="row-value">{threshold(claim)}</span>{null}{amended}'


def _run_cell(page: Page, record: Mapping[str, Any] | None) -> str:
    if record is None:
        return ""
    profile = record["profile"]
    lines = [
        f'<span class="row-value">{profile}</span>',
        f'<span class="row-note">{record["date"][:10]}</span>',
    ]
    wall = f", {duration(record['wall_s'])}" if record.get("wall_s") else ""
    lines.append(f'<span class="row-note">{text(str(record.get("machine", "")))}{wall}</span>')
    if profile in page.drifted:
        lines.append('<span class="row-note drifted">library has changed since</span>')
    return "".join(lines)
