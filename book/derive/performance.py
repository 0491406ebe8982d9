"""The performance page: the benchmark record as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from derive.markup import raw, text
from minilib.tables import number

RECORD = Path("tests/benchmarks/record.json")
HEADS = ("What is timed", "minilib", "Its peer", "Ratio", "Goal", "Met")


def table(root: Path) -> str:
    """One line a benchmark. Ratios are minilib's time over its peer's: below 1 is faster; exponents say how time grows."""
    path = root / RECORD
    if not path.is_file():
        return f"There is no benchmark record yet: `make bench` measures and writes `{RECORD}`.\n"
    rows = json.loads(path.read_text(encoding="utf-8"))
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    body = "".join(_row(row) for row in rows)
    notes = "".join(f'<p class="row-note">{text(line)}</p>' for line in sorted({_where(row) for row in rows}))
    return raw(f'<table class="results"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{notes}')


def _row(row: Mapping[str, Any]) -> str:
    cells = (text(row["name"]), *_cells(row))
    inner = "".join(f'<td data-label="{h}">{c}</td>' for h, c in zip(HEADS, cells, strict=True))
    return f"<tr>{inner}</tr>"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """All but the first cell: of a ratio, of an exponent, or of a peer that could not be measured."""
    peer = f'<span class="row-note">{text(row["peer"])}</span>'
    if "not_measured" in row:
        return (
            "–",
            f"–{peer}",
            f'–<span class="row-note">{text(row["not_measured"])}</span>',
            _goal(row),
            "not measured",
        )
    if "exponent" in row:
        low, high = row["interval"]
        sizes, times = (", ".join(number(v) for v in row[key]) for key in ("sizes", "ms"))
        found = f'grows as N<sup>{row["exponent"]:.2f}</sup><span class="row-note">fit: {low:.2f} to {high:.2f}</span>'
        met = row["goal"][0] <= row["exponent"] <= row["goal"][1]
        return (f'{times} ms<span class="row-note">at N = {sizes}</span>', peer, found, _goal(row), _met(met))
    ratio = f'<span class="row-value">{row["ratio"]:.2f}</span><span class="row-note">against itself: {row["noise"]:.2f}</span>'
    met = row["ratio"] <= row["goal"]
    return (
        f"{number(row['ours_ms'])} ms",
        f"{number(row['peer_ms'])} ms{peer}",
        ratio,
        _goal(row),
        _met(met),
    )


def _goal(row: Mapping[str, Any]) -> str:
    goal = row["goal"]
    return f"{number(goal[0])} to {number(goal[1])}" if isinstance(goal, list) else f"≤ {number(goal)}"


def _met(met: bool) -> str:
    verdict = ("confirmed", "✓ yes") if met else ("contradicted", "✗ no")
    return f'<span class="verdict verdict-{verdict[0]}">{verdict[1]}</span>'


def _where(row: Mapping[str, Any]) -> str:
    threads = f"{row['threads']} thread{'s' if row['threads'] != 1 else ''}"
    return f"{row['date']}, {row['machine']}, {threads}, torch {row['torch']}, diffusers {row['diffusers']}"
