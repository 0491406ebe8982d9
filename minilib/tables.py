"""The tables a page shows: its card, its settings, its claims. As HTML for the book, as text for a terminal.

Verdicts are written as words with a sign; colour only repeats them. Text inherits the page's colour, for dark mode.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from minilib.cards import Card, Claim

SIGNS = {"confirmed": "✓", "weaker": "≈", "inconclusive": "?", "contradicted": "✗", "not tried": "–"}
# Okabe and Ito's palette: told apart by colour-blind readers.
_COLOURS = {
    "confirmed": "#009E73",
    "weaker": "#56B4E9",
    "inconclusive": "#E69F00",
    "contradicted": "#D55E00",
    "not tried": "#999999",
}
_STYLE = """<style>
.minilib-table {overflow-x: auto; margin: .5em 0;}
.minilib-table table {border-collapse: collapse; color: inherit; background: none; font-size: .92em;}
.minilib-table caption {caption-side: top; text-align: left; font-weight: 600; padding: .2em 0; color: inherit;}
.minilib-table th, .minilib-table td {border: 1px solid rgba(128, 128, 128, .45); padding: .3em .6em;
  text-align: left; vertical-align: top; color: inherit; background: none;}
.minilib-table .chosen {font-weight: 600;}
.minilib-table summary {cursor: pointer; font-weight: 600; padding: .2em 0;}
details.minilib-table td {width: 50%;}
.minilib-table p {margin: .3em 0; font-size: .88em; opacity: .85;}
.minilib-verdict {white-space: nowrap; font-weight: 600; padding-left: .4em; border-left: .4em solid #999999;}
"""
_STYLE += "".join(
    f".verdict-{n.replace(' ', '-')} {{border-left-color: {c};}}\n" for n, c in _COLOURS.items()
)
_STYLE += "</style>"


def prose(text: str) -> str:
    """A card's text as HTML; backticks make code of what is between them.

    >>> prose("`eta` < 1")
    '<code>eta</code> &lt; 1'
    """
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def number(value: float | None) -> str:
    """A number with four significant digits.

    >>> number(0.123456), number(2.0), number(None)
    ('0.1235', '2', '–')
    """
    return "–" if value is None else f"{value:.4g}"


def target(claim: Claim) -> str:
    """What a claim must reach, in words and signs."""
    if claim.direction is None or claim.threshold is None:
        return "–"
    if isinstance(claim.threshold, tuple):
        return f"within [{number(claim.threshold[0])}, {number(claim.threshold[1])}]"
    text = f"{'≥' if claim.direction == 'at_least' else '≤'} {number(claim.threshold)}"
    return text if claim.null is None else f"{text} (no effect: {number(claim.null)})"


def here(claim: Claim, result: Mapping[str, Any]) -> str:
    """What was measured here: mean, 90 % interval and number of values; of an exact claim the worst value."""
    n = len(result["values"])
    if n == 0:
        return "–"
    if claim.kind == "exact" and n > 1:
        return f"{number(_worst(claim, result['values']))}, the worst of {n}"
    if result["interval"] is None:
        return number(result["mean"])
    low, high = result["interval"]
    return f"{number(result['mean'])} [{number(low)}, {number(high)}], n = {n}"


def _worst(claim: Claim, values: Sequence[float]) -> float:
    """The value that is least in favour of the claim: the one on which an exact claim stands or falls."""
    if isinstance(claim.threshold, tuple):
        middle = sum(claim.threshold) / 2
        return max(values, key=lambda value: abs(value - middle))
    return min(values) if claim.direction == "at_least" else max(values)


def badge(verdict: str) -> str:
    """A verdict as HTML: sign, word, coloured edge."""
    name = f"verdict-{verdict.replace(' ', '-')}"
    return f'<span class="minilib-verdict {name}">{SIGNS[verdict]} {verdict}</span>'


def _html(
    name: str, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]
) -> str:
    """A table from cells that are HTML already."""
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    thead = f"<thead><tr>{header}</tr></thead>" if head else ""
    foot = "".join(f"<p>{note}</p>" for note in notes)
    title = f"<caption>{caption}</caption>" if caption else ""
    table = f"<table>{title}{thead}<tbody>{body}</tbody></table>"
    return f'{_STYLE}<div class="minilib-table {name}">{table}{foot}</div>'


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    """A plain table whose cells wrap at the given widths."""
    lines = []
    for row in [head, *rows]:
        cells = [textwrap.wrap(str(cell), width) or [""] for cell, width in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            parts = [
                (cell[i] if i < len(cell) else "").ljust(w) for cell, w in zip(cells, widths, strict=True)
            ]
            lines.append("  ".join(parts).rstrip())
        lines.append("  ".join(("=" if row is head else "-") * width for width in widths))
    return "\n".join(lines)


def run_line(record: Mapping[str, Any]) -> str:
    """One line on the run: profile, time, machine."""
    versions = record["versions"]
    threads = f"{record['threads']} thread{'s' if record['threads'] != 1 else ''} a process"
    time = f"{record['wall_s']:.0f} s" if record["wall_s"] >= 10 else f"{record['wall_s']:.1f} s"
    return (
        f"Profile {record['profile']}, {time}, {record['device']}, {threads}, {record['machine']}, "
        f"torch {versions['torch']}, {record['date'][:10]}."
    )


def _claim_notes(card: Card, record: Mapping[str, Any]) -> list[str]:
    notes = [f"Not tried: {claim.id}: {claim.not_tried}" for claim in card.claims if claim.not_tried]
    notes += [
        f"Not tried in this run: {name}: {entry['not_tried']}"
        for name, entry in record["claims"].items()
        if "not_tried" in entry
    ]
    notes += [f"Amended {a.date} ({a.claim}): {a.change} Reason: {a.reason}" for a in card.amendments]
    if record["profile"] == "smoke":
        notes.append("The smoke profile is too small to judge a claim: only exact claims are asserted.")
    return [*notes, run_line(record)]


CLAIM_COLUMNS = ("claim", "the paper's figure", "here: mean [90 % interval]", "threshold", "verdict")


def claims_html(card: Card, record: Mapping[str, Any]) -> str:
    """The claims table as HTML."""
    rows = []
    for claim in card.claims:
        result = record["claims"][claim.id]
        name = f"<code>{escape(claim.id)}</code> <small>({claim.kind})</small><br>{prose(claim.statement)}"
        cells = (
            name,
            prose(claim.paper),
            escape(here(claim, result)),
            escape(target(claim)),
            badge(result["verdict"]),
        )
        rows.append(cells)
    notes = [prose(note) for note in _claim_notes(card, record)]
    return _html("minilib-claims", f"Claims of {escape(card.title)}", CLAIM_COLUMNS, rows, notes)


def claims_text(card: Card, record: Mapping[str, Any]) -> str:
    """The claims table as text."""
    rows = []
    for claim in card.claims:
        result = record["claims"][claim.id]
        sign = f"{SIGNS[result['verdict']]} {result['verdict']}"
        rows.append((f"{claim.id}: {claim.statement}", claim.paper, here(claim, result), target(claim), sign))
    table = text_table(CLAIM_COLUMNS, rows, (38, 24, 28, 18, 14))
    return "\n".join([card.title, "", table, *_claim_notes(card, record)])


def card_html(card: Card) -> str:
    """The card as HTML: the paper, what stands in for what, the claims with their thresholds."""
    facts = [("idea", prose(card.summary))]
    if card.authors:
        year = f" ({card.year})" if card.year else ""
        facts.insert(0, ("paper", f"{escape(card.title)}. {escape(', '.join(card.authors))}{year}"))
    if card.arxiv:
        facts.append(("arXiv", f'<a href="https://arxiv.org/abs/{card.arxiv}">{card.arxiv}</a>'))
    if card.official_code:
        facts.append(("official code", "<br>".join(map(_link, card.official_code))))
    facts.append(("stands in here", prose(card.stands_in)))
    about = _html("minilib-card", escape(card.title), (), facts, ())
    claims = _html("minilib-card", "", ("claim", "confirmed if"), [_claim_row(c) for c in card.claims], ())
    count = f"{len(card.claims)} claim{'s' if len(card.claims) != 1 else ''}"
    # Folded: on a page with thirty claims the table alone fills several screens before the idea is told.
    amended = ", ".join(dict.fromkeys(escape(change.claim) for change in card.amendments))
    when = "written down before the first run" + (f"; amended since: {amended}" if amended else "")
    return (
        f'{about}<details class="minilib-table"><summary>{count} with thresholds, {when}</summary>'
        f"{claims}</details>"
    )


def _claim_row(claim: Claim) -> tuple[str, str]:
    text = f"<code>{escape(claim.id)}</code> <small>({claim.kind})</small><br>{prose(claim.statement)}"
    if claim.not_tried:
        return text, f"Not tried: {prose(claim.not_tried)}"
    metric = f"<br><small>{prose(claim.metric)}</small>" if claim.metric else ""
    return text, f"{escape(target(claim))}{metric}"


def _link(code: str) -> str:
    code = escape(code)
    return f'<a href="{code}">{code}</a>' if code.startswith("https://") else code


def card_text(card: Card) -> str:
    """The card as text."""
    rows = [("idea", card.summary), ("stands in here", card.stands_in)]
    if card.authors:
        rows.insert(0, ("authors", f"{', '.join(card.authors)} ({card.year})"))
    if card.arxiv:
        rows.append(("arXiv", card.arxiv))
    for claim in card.claims:
        aim = f"Not tried: {claim.not_tried}" if claim.not_tried else f"Confirmed if {target(claim)}"
        rows.append((f"{claim.id} ({claim.kind})", f"{claim.statement} {aim}"))
    return text_table((card.title, ""), rows, (30, 80))


def _cell(value: Any) -> str:
    return ", ".join(map(_cell, value)) if isinstance(value, list | tuple) else str(value)


def settings_rows(settings: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """One row a setting, one column a profile."""
    names = list(dict.fromkeys(name for values in settings.values() for name in values))
    return [[name, *(_cell(values.get(name, "–")) for values in settings.values())] for name in names]


def settings_html(settings: Mapping[str, Mapping[str, Any]], profile: str) -> str:
    """The settings of every profile as HTML, the chosen one in bold."""
    chosen = [name == profile for name in ("", *settings)]

    def mark(cells: Sequence[str]) -> list[str]:
        pairs = zip(cells, chosen, strict=True)
        return [f'<span class="chosen">{escape(c)}</span>' if bold else escape(c) for c, bold in pairs]

    rows = [mark(row) for row in settings_rows(settings)]
    caption = f"Settings; this run: {profile}"
    return _html("minilib-settings", caption, mark(["setting", *settings]), rows, ())


def settings_text(settings: Mapping[str, Mapping[str, Any]], profile: str) -> str:
    """The settings of every profile as text."""
    head = ["setting", *(f"{name} (this run)" if name == profile else name for name in settings)]
    return text_table(head, settings_rows(settings), [24, *[24] * len(settings)])
