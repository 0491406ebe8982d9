"""The performance page: the benchmark record as a table."""

from __future__ import annotations

import json
from pathlib import Path

from derive.markup import raw, text
from minilib.tables import number

RECORD = Path("tests/benchmarks/record.json")
HEADS = ("What is timed", "minilib", "diffusers", "Ratio", "Goal", "Met")


def table(root: Path) -> str:
    """One line a benchmark. Ratios are minilib's time over the other's: below 1 is faster."""
    path = root / RECORD
    if not path.is_file():
        return f"There is no benchmark record yet: `make bench` measures and writes `{RECORD}`.\n"
    record = json.loads(path.read_text(encoding="utf-8"))
    heads = "".join(f'<th scope="col">{head}</th>' for head in HEADS)
    body = []
    for row in record["rows"]:
        met = row["ratio"] <= row["goal"]
        mark = "confirmed" if met else "contradicted"
        cells = (
            text(row["name"]),
            f"{number(row['ours_ms'])} ms",
            f"{number(row['peer_ms'])} ms",
            f"<strong>{number(row['ratio'])}</strong>",
            f"≤ {number(row['goal'])}",
            f'<span class="verdict verdict-{mark}">{"✓ yes" if met else "✗ no"}</span>',
        )
        inner = "".join(f'<td data-label="{h}">{c}</td>' for h, c in zip(HEADS, cells, strict=True))
        body.append(f"<tr>{inner}</tr>")
    where = ", ".join(str(record[key]) for key in ("machine", "date") if record.get(key))
    note = f'<p class="row-note">Measured on {text(where)}.</p>' if where else ""
    return raw(
        f'<table class="results"><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table>{note}'
    )
