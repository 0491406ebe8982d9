"""Small pieces of HTML: numbers, verdicts, intervals."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from derive.shelf import NOT_RUN, Page, Shelf
from minilib import tables
from minilib.cards import Claim
from minilib.tables import number
from minilib.verdicts import VERDICTS

SIGNS = {**tables.SIGNS, NOT_RUN: "…"}
ALL_VERDICTS = (*VERDICTS, NOT_RUN)


def text(value: str) -> str:
    """A card's plain text as HTML; `code` in backticks is kept as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(value, quote=True))


def threshold(claim: Claim) -> str:
    """The threshold of a claim in one line, with the value of 'no effect' where it has one."""
    if claim.threshold is None:
        return ""
    if isinstance(claim.threshold, tuple):
        return f"in [{number(claim.threshold[0])}, {number(claim.threshold[1])}]"
    sign = {"at_least": "≥", "at_most": "≤"}[claim.direction or ""]
    return f"{sign} {number(claim.threshold)}"


def slug(verdict: str) -> str:
    """A verdict as part of a class name."""
    return verdict.replace(" ", "-")


def chip(verdict: str, count: int | None = None) -> str:
    """A verdict as a coloured label that also reads without colour."""
    label = verdict if count is None else f"{count} {verdict}"
    sign = f'<span aria-hidden="true">{SIGNS[verdict]}</span>'
    return f'<span class="verdict verdict-{slug(verdict)}">{sign} {label}</span>'


def tally(page: Page) -> str:
    """Counts of a page's verdicts, as labels."""
    counts = Counter(page.verdicts().values())
    return " ".join(chip(v, counts[v]) for v in ALL_VERDICTS if counts[v])


def duration(seconds: float) -> str:
    """Seconds as a reader says them.

    >>> duration(48.2), duration(312)
    ('48 s', '5 min 12 s')
    """
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def interval_plot(claim: Claim, result: Mapping[str, Any]) -> str:
    """A small drawing of mean and interval against the threshold and 'no effect'; empty where there is no interval."""
    if not result.get("interval") or claim.threshold is None:
        return ""
    low, high = result["interval"]
    marks = claim.threshold if isinstance(claim.threshold, tuple) else (claim.threshold,)
    points = [low, high, *marks, *([] if claim.null is None else [claim.null])]
    left, right = min(points), max(points)
    span = (right - left) or 1.0

    def x(value: float) -> str:
        return f"{8 + 104 * (value - left) / span:.1f}"

    lines = ['<line class="rail" x1="2" x2="118" y1="12" y2="12"/>']
    if claim.null is not None:
        lines.append(f'<line class="null" x1="{x(claim.null)}" x2="{x(claim.null)}" y1="2" y2="22"/>')
    lines += [f'<line class="threshold" x1="{x(m)}" x2="{x(m)}" y1="2" y2="22"/>' for m in marks]
    lines.append(f'<line class="interval" x1="{x(low)}" x2="{x(high)}" y1="12" y2="12"/>')
    lines.append(f'<circle class="mean" cx="{x(result["mean"])}" cy="12" r="4"/>')
    null = "" if claim.null is None else f", no effect {number(claim.null)}"
    label = f"mean {number(result['mean'])}, interval {number(low)} to {number(high)}, threshold {threshold(claim)}{null}"
    kind = slug(result["verdict"])
    return f'<svg class="interval-plot plot-{kind}" viewBox="0 0 120 24" role="img" aria-label="{label}">{"".join(lines)}</svg>'


def page_cards(shelf: Shelf, part: str | None = None, prefix: str = "") -> str:
    """One card a page: title, idea, verdicts. ``prefix`` leads from the page it stands on to the book's root."""
    cards = []
    for page in shelf.readable(part):
        where = "" if part else f'<span class="page-card-part">{text(shelf.parts[page.card.part])}</span>'
        cards.append(
            f'<a class="page-card" href="{prefix}{page.docname}.html">{where}'
            f'<span class="page-card-title">{text(page.title)}</span>'
            f'<span class="page-card-summary">{text(page.card.summary)}</span>'
            f'<span class="page-card-verdicts">{tally(page)}</span></a>'
        )
    empty = '<p class="empty">No page has been run yet.</p>'
    return raw(f'<div class="page-cards">{"".join(cards)}</div>' if cards else empty)


def raw(markup: str) -> str:
    """A block of HTML in a MyST page."""
    return f"```{{raw}} html\n{markup}\n```\n"
