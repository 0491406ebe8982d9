"""The worked example of "How to read a verdict": made-up values, judged by the code that judges every claim."""

from __future__ import annotations

from derive.markup import chip, interval_plot, raw
from minilib.cards import Claim
from minilib.tables import number
from minilib.verdicts import summarise

CLAIM = Claim(
    id="speedup",
    statement="the fast method halves the time",
    paper="made up",
    kind="cost",
    metric="ratio of times, full / fast",
    direction="at_least",
    threshold=1.5,
    null=1.0,
    seeds=5,
    asserted_in=(),
)
OUTCOMES = (
    (1.9, 2.1, 2.0, 2.3, 1.7),
    (1.2, 1.4, 1.3, 1.1, 1.5),
    (0.7, 1.5, 1.2, 0.8, 1.3),
    (0.8, 0.9, 0.7, 0.85, 0.75),
)
HEADS = ("Values", "Mean and interval", "Drawing", "Verdict")


def table() -> str:
    """A line an outcome: its values, mean, interval, drawing and verdict."""
    body = []
    for values in OUTCOMES:
        result = summarise(CLAIM, values)
        low, high = result["interval"]
        cells = (
            ", ".join(number(value) for value in values),
            f'<span class="row-value">{number(result["mean"])}</span> [{number(low)}, {number(high)}]',
            interval_plot(CLAIM, result),
            chip(result["verdict"]),
        )
        inner = "".join(
            f'<td data-label="{h}"><span>{c}</span></td>' for h, c in zip(HEADS, cells, strict=True)
        )
        body.append(f"<tr>{inner}</tr>")
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    return raw(
        f'<table class="results"><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    )
