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
    """One line a benchmark. Ratios are minilib's time over its peer's: below 1 is faster."""
    path = root / RECORD
    if not path.is_file():
        return f"There is no benchmark record yet: `make bench` measures and writes `{RECORD}`.\n"
    rows = json.loads(path.read_text(encoding="utf-8"))
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    body = "".join(_row(row) for row in rows)
    notes = "".join(f'<p class="row-note">{text(line)}</p>' for line in sorted({_where(row) for row in rows}))
    return raw(f'<table class="results"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{notes}')


def _row(row: Mapping[str, Any]) -> str:
    met = row["ratio"] <= row["goal"]
    verdict = f'<span class="verdict verdict-{"confirmed" if met else "contradicted"}">{"✓ yes" if met else "✗ no"}</span>'
    cells = (
        text(row["name"]),
        f"{number(row['ours_ms'])} ms",
        f'{number(row["peer_ms"])} ms<span class="row-note">{text(row["peer"])}</span>',
        f'<span class="row-value">{row["ratio"]:.2f}</span><span class="row-note">against itself: {row["noise"]:.2f}</span>',
        f"≤ {number(row['goal'])}",
        verdict,
    )
    inner = "".join(f'<td data-label="{h}">{c}</td>' for h, c in zip(HEADS, cells, strict=True))
    return f"<tr>{inner}</tr>"


def _where(row: Mapping[str, Any]) -> str:
    threads = f"{row['threads']} thread{'s' if row['threads'] != 1 else ''}"
    return f"{row['date']}, {row['machine']}, {threads}, torch {row['torch']}, diffusers {row['diffusers']}"
