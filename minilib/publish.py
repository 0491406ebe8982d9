"""Execute pages and publish what they produced. The command line behind ``make page``, ``make pages`` and the checks.

::

    python -m minilib.publish SLUG... --profile cpu [--force]     execute if needed, then write notebook and record
    python -m minilib.publish execute SLUG --profile P --out DIR  execute only (what the Snakefile calls)
    python -m minilib.publish sync [SLUG...]                      text -> notebook, outputs of unchanged cells kept
    python -m minilib.publish table SLUG --profile P              the claims table of the last run
    python -m minilib.publish dashboard FILE RECORD...            one line a claim, as CSV
    python -m minilib.publish check                               do cards, texts, notebooks and records agree?
    python -m minilib.publish receipts DIR --since TIME           did every page really run?
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilib import consistency, execution, pages, tables
from minilib.cards import PROFILES, Card, CardError, all_cards, load_card
from minilib.execution import PageFailed, checkout, execute, page_text, write_all
from minilib.resources import atomic_write

COMMANDS = ("page", "execute", "sync", "table", "dashboard", "check", "receipts")
DASHBOARD = (
    *("slug", "part", "claim", "kind", "verdict", "mean", "low", "high", "n", "threshold", "null"),
    *("profile", "wall_s", "peak_mb", "machine", "date"),
)


def results(slug: str, profile: str, root: Path) -> tuple[Path, Path]:
    """Where a run leaves its notebook and its record."""
    folder = root / "results" / profile
    return folder / f"{slug}.ipynb", folder / f"{slug}.json"


def publish(slug: str, profile: str, *, force: bool = False, root: str | Path | None = None) -> str:
    """Bring the published notebook and record of a page up to date; says in a line what was done.

    A cpu run is published as the committed notebook and ``cpu.json``, a gpu run as ``gpu.json``; a smoke run stays in
    ``results/``. A run that is there already, of this very page and library, is not repeated. A failing run changes nothing.
    """
    root = checkout(root)
    card = load_card(slug, root)
    text = page_text(card, root)
    target = root / "reproductions" / slug / f"{profile}.json"
    notebook_path, record_path = results(slug, profile, root)
    if not force and profile != "smoke" and _published(card, profile, text, root):
        changed = sync(slug, root=root) if profile == "cpu" else False
        return "text updated, outputs kept" if changed else "up to date"
    fresh = force or not (
        notebook_path.is_file()
        and record_path.is_file()
        and consistency.is_current(consistency.read_record(record_path), card, text)
    )
    if fresh:
        execute(slug, profile, notebook_path, record_path, root)
    elif profile == "smoke":
        return "up to date"
    if profile == "smoke":
        return f"executed; see {record_path.relative_to(root)}"
    for name, entry in consistency.read_record(record_path)["claims"].items():
        if "not_tried" in entry:
            raise PageFailed(f"{slug} ({profile}): not published: {name}: {consistency.untried(entry)}")
    files = {target: record_path.read_text(encoding="utf-8")}
    if profile == "cpu":
        notebook = pages.with_outputs(pages.notebook_of(text), pages.read_notebook(notebook_path))
        files = {root / card.notebook: pages.dump_notebook(notebook), **files}
    write_all(files)
    written = " and ".join(str(path.relative_to(root)) for path in files)
    return f"{'executed' if fresh else 'taken from results/'}; wrote {written}"


def _published(card: Card, profile: str, text: str, root: Path) -> bool:
    """Whether what is committed was made by this page and this library, both files by the same run."""
    path = root / "reproductions" / card.slug / f"{profile}.json"
    if not path.is_file():
        return False
    record = consistency.read_record(path)
    if not consistency.is_current(record, card, text):
        return False
    if profile != "cpu":
        return True
    if not (root / card.notebook).is_file():
        return False
    notebook = pages.read_notebook(root / card.notebook)
    try:
        return not pages.never_ran(notebook) and pages.embedded_record(notebook) == record
    except pages.PageError:
        return False


def sync(slug: str, root: str | Path | None = None) -> bool:
    """Write a page's notebook anew from its text; cells whose code is unchanged keep their outputs. Says if it changed."""
    root = checkout(root)
    card = load_card(slug, root)
    path = root / card.notebook
    notebook = pages.notebook_of(page_text(card, root))
    if path.is_file():
        notebook = pages.with_outputs(notebook, pages.read_notebook(path))
    new = pages.dump_notebook(notebook)
    if path.is_file() and path.read_text(encoding="utf-8") == new:
        return False
    atomic_write(path, new)
    return True


def table(slug: str, profile: str, root: str | Path | None = None) -> str:
    """The claims table of the last run of a page, as text: from ``results/`` or as published, whichever is newer."""
    root = checkout(root)
    card = load_card(slug, root)
    places = (results(slug, profile, root)[1], root / "reproductions" / slug / f"{profile}.json")
    records = [consistency.read_record(path) for path in places if path.is_file()]
    # A record made before the card's claims changed cannot fill this table.
    records = [record for record in records if set(record["claims"]) == {claim.id for claim in card.claims}]
    if not records:
        raise FileNotFoundError(
            f"{slug}: no record for profile {profile}; run: make page SLUG={slug} PROFILE={profile}"
        )
    return tables.claims_text(card, max(records, key=lambda record: record["date"]))


def dashboard(records: Sequence[str | Path], root: str | Path | None = None) -> str:
    """Records as CSV, one line a claim."""
    out = io.StringIO()
    writer = csv.DictWriter(out, DASHBOARD, lineterminator="\n")
    writer.writeheader()
    for path in records:
        record = consistency.read_record(Path(path))
        card = load_card(record["slug"], root)
        shared: dict[str, Any] = {"part": card.part}
        shared |= {key: record[key] for key in ("slug", "profile", "wall_s", "peak_mb", "machine", "date")}
        for claim in card.claims:
            entry = record["claims"][claim.id]
            low, high = entry["interval"] or (None, None)
            limit = (
                "..".join(map(str, claim.threshold))
                if isinstance(claim.threshold, tuple)
                else claim.threshold
            )
            row = {"claim": claim.id, "kind": claim.kind, "verdict": entry["verdict"], "mean": entry["mean"]}
            row |= {
                "low": low,
                "high": high,
                "n": len(entry["values"]),
                "threshold": limit,
                "null": claim.null,
            }
            writer.writerow(shared | row)
    return out.getvalue()


def _seconds(text: str) -> float:
    """A moment, in seconds of the epoch, from seconds or an ISO date."""
    try:
        return float(text)
    except ValueError:
        return datetime.datetime.fromisoformat(text).astimezone().timestamp()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minilib.publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("page", help="execute if needed, then publish (the default command)")
    page.add_argument("slugs", nargs="+", metavar="SLUG")
    page.add_argument("--force", action="store_true", help="execute even if everything is up to date")
    run = commands.add_parser("execute", help="execute only")
    run.add_argument("slug", metavar="SLUG")
    run.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for SLUG.ipynb and SLUG.json"
    )
    run.add_argument("--end-with", type=int, metavar="PID", help="stop when the process PID has died")
    show = commands.add_parser("table", help="the claims table of the last run")
    show.add_argument("slug", metavar="SLUG")
    for command in (page, run, show):
        command.add_argument("--profile", choices=PROFILES, default="cpu")
    commands.add_parser("sync", help="text -> notebook").add_argument("slugs", nargs="*", metavar="SLUG")
    board = commands.add_parser("dashboard", help="one line a claim, as CSV")
    board.add_argument("out", type=Path, metavar="FILE")
    board.add_argument("records", nargs="*", type=Path, metavar="RECORD")
    commands.add_parser("check", help="do cards, texts, notebooks and records agree?")
    receipts = commands.add_parser("receipts", help="did every page really run?")
    receipts.add_argument("folder", type=Path, metavar="DIR")
    receipts.add_argument(
        "--since", type=_seconds, required=True, help="seconds of the epoch, or an ISO date"
    )
    receipts.add_argument("--profile", choices=PROFILES, default="smoke")
    return parser


def _report(problems: Sequence[str], notes: Sequence[str], good: str) -> int:
    for line in notes:
        print(f"note: {line}")
    for line in problems:
        print(f"problem: {line}", file=sys.stderr)
    if not problems:
        print(good)
    return 1 if problems else 0


def _run(args: argparse.Namespace) -> int:
    if args.command == "page":
        for slug in args.slugs:
            print(f"{slug} ({args.profile}): {publish(slug, args.profile, force=args.force)}", flush=True)
    elif args.command == "execute":
        if args.end_with is not None:
            execution.end_with(args.end_with)
        execute(args.slug, args.profile, args.out / f"{args.slug}.ipynb", args.out / f"{args.slug}.json")
    elif args.command == "sync":
        for slug in args.slugs or [card.slug for card in all_cards(checkout())]:
            print(f"{slug}: {'written' if sync(slug) else 'up to date'}")
    elif args.command == "table":
        print(table(args.slug, args.profile))
    elif args.command == "dashboard":
        atomic_write(args.out, dashboard(args.records))
    elif args.command == "check":
        problems, notes = consistency.check()
        return _report(problems, notes, "cards, texts, notebooks and records agree")
    else:
        problems = consistency.receipt_problems(args.folder, args.since, args.profile)
        return _report(problems, (), "every page really ran")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] not in COMMANDS and not argv[0].startswith("-"):
        argv.insert(0, "page")
    args = _parser().parse_args(argv)
    if args.command in ("page", "execute"):
        execution.log_to_terminal()
        execution.end_cleanly()
    try:
        return _run(args)
    except (CardError, PageFailed, pages.PageError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
