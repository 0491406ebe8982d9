"""Run a page: text -> notebook -> papermill, in an empty folder -> outputs and record. The only way pages are executed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minilib import pages
from minilib.cards import Card, load_card
from minilib.keys import PACKAGE, library_key, page_key
from minilib.resources import atomic_write, repo_root

TRACEBACK_LINES = 25
# A loaded machine may need several times the budget; a cell that needs more hangs.
PATIENCE = 6
RECORD_ORDER = (
    *("slug", "profile", "device", "settings", "claims", "wall_s", "peak_mb", "threads"),
    *("machine", "versions", "date", "modules", "zoo", "data"),
)
_PARAMETERS = re.compile(r"""^# %%.*\btags=\[[^\]]*["']parameters["']""", re.MULTILINE)


class PageFailed(RuntimeError):
    """A page that did not run to its end; the message ends with the traceback's end."""


def checkout(root: str | Path | None = None) -> Path:
    """The checkout to work in. Pages are executed and published in one, never from an installed wheel."""
    found = Path(root) if root is not None else repo_root()
    if found is None:
        raise FileNotFoundError(
            "no checkout here: run this in a clone of the repository, or set MINILIB_ROOT to one"
        )
    return found


def page_text(card: Card, root: Path) -> str:
    """The text of a card's page."""
    path = root / card.text
    if not path.is_file():
        raise pages.PageError(f"{path}: the card {card.slug!r} has no page there; write its text")
    text = path.read_text(encoding="utf-8")
    tagged = len(_PARAMETERS.findall(text))
    if tagged != 1:
        raise pages.PageError(
            f"{path}: {tagged} cells are tagged 'parameters'; exactly one must be: it sets the profile"
        )
    return text


def execute(
    slug: str, profile: str, out_notebook: str | Path, out_record: str | Path, root: str | Path | None = None
) -> dict[str, Any]:
    """Run one page and write its executed notebook and its record: both or neither.

    Returns the record. Raises PageFailed with the traceback's end; the failed notebook is then kept as
    ``logs/<slug>.failed.ipynb`` beside the notebook that was asked for.
    """
    root = checkout(root)
    out_notebook, out_record = Path(out_notebook), Path(out_record)
    card = load_card(slug, root)
    text = page_text(card, root)
    fresh = pages.notebook_of(text)
    logs = out_notebook.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    failed = logs / f"{slug}.failed.ipynb"
    with alone(logs / f"{slug}.lock", slug):
        failed.unlink(missing_ok=True)
        commit = git_commit(card, root)
        executed, seconds = _papermill(fresh, card, profile, root, failed)
        notebook = pages.with_outputs(fresh, _without_injected(executed))
        for count, cell in enumerate(pages.code(notebook), 1):
            cell.execution_count = count if cell.execution_count is not None else None
        problems = pages.never_ran(notebook)
        if problems:
            atomic_write(failed, pages.dump_notebook(executed))
            raise PageFailed(f"{slug}: did not really run: {'; '.join(problems)}\nnotebook: {failed}")
        record = _complete(pages.embedded_record(notebook), card, profile, text)
        record |= {"notebook_s": round(seconds, 2), "commit": commit}
        pages.embed_record(notebook, record)
        write_all({out_notebook: pages.dump_notebook(notebook), out_record: dump_record(record)})
    return record


def _complete(record: dict[str, Any], card: Card, profile: str, text: str) -> dict[str, Any]:
    if (record["slug"], record["profile"]) != (card.slug, profile) or not record["wall_s"] > 0:
        found = f"{record['slug']}, profile {record['profile']}, {record['wall_s']} s"
        raise PageFailed(
            f"{card.slug}: the record it left says: {found}. Is `profile` passed on to Reproduction?"
        )
    # The notebook format sorts keys; a record is read by people, in the card's order.
    record = {key: record[key] for key in sorted(record, key=RECORD_ORDER.index)}
    record["claims"] = {claim.id: record["claims"][claim.id] for claim in card.claims}
    record["page_key"] = page_key(text, card, record["settings"])
    record["library_key"] = library_key(record["modules"], record["zoo"])
    return record


def _papermill(fresh: Any, card: Card, profile: str, root: Path, failed: Path) -> tuple[Any, float]:
    """The executed notebook (with papermill's own cell in it) and the seconds it took."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    with tempfile.TemporaryDirectory(prefix="minilib-") as folder:
        source, target, empty = (Path(folder, name) for name in ("in.ipynb", "out.ipynb", "work"))
        empty.mkdir()
        source.write_text(pages.dump_notebook(fresh), encoding="utf-8")
        started = time.perf_counter()
        try:
            with _environment(kernel_environment(profile, root)):
                _with_a_second_start(
                    papermill.execute_notebook,
                    str(source),
                    str(target),
                    parameters={"profile": profile},
                    kernel_name="python3",
                    cwd=str(empty),
                    progress_bar=False,
                    log_output=True,
                    start_timeout=300,
                    execution_timeout=int(card.minutes[profile] * 60 * PATIENCE),
                )
        except (PapermillExecutionError, CellTimeoutError, DeadKernelError) as error:
            if target.is_file():
                atomic_write(failed, target.read_bytes())
            lines = _plain_text(str(error)).strip().splitlines()[-TRACEBACK_LINES:]
            kept = f"notebook: {failed}" if failed.is_file() else "no notebook was left"
            raise PageFailed(f"{card.slug} ({profile}) failed:\n" + "\n".join(lines) + f"\n{kept}") from None
        return pages.read_notebook(target), time.perf_counter() - started


def _with_a_second_start(execute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call again if the kernel did not come up: of two that start at once one may find its port taken; no cell has run yet."""
    try:
        return execute(*args, **kwargs)
    except RuntimeError as error:
        if type(error) is not RuntimeError or "before replying" not in str(error):
            raise
        return execute(*args, **kwargs)


def _plain_text(text: str) -> str:
    """Without the colours of a traceback."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _without_injected(notebook: Any) -> Any:
    notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    return notebook


def kernel_environment(profile: str, root: Path) -> dict[str, str]:
    """What a page's kernel needs: one thread a process, one process at smoke, this very minilib, figures in the page."""
    paths = [str(PACKAGE.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    threads = os.environ.get("OMP_NUM_THREADS") or "1"
    env = {
        # Snakemake gives a job's numbers of threads to all of these, and where they differ torch goes by MKL's.
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads),
        "MINILIB_ROOT": str(root.resolve()),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        # A backend set outside, such as Agg, would keep figures out of the notebook.
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    if profile == "smoke":
        env["MINILIB_JOBS"] = os.environ.get("MINILIB_JOBS") or "1"
    return env


@contextlib.contextmanager
def _environment(extra: Mapping[str, str]) -> Iterator[None]:
    saved = dict(os.environ)
    os.environ.update(extra)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)


@contextlib.contextmanager
def alone(path: Path, name: str) -> Iterator[None]:
    """Hold a lock while a page runs. The system frees it when the process dies, however it dies."""
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{name}: waiting for another run of this page to end", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def git_commit(card: Card, root: Path) -> str | None:
    """The commit checked out, with "-dirty" if minilib, the card or the page differ from it; None outside git."""

    def git(*args: str) -> str | None:
        command = ["git", "--no-optional-locks", "-C", str(root), *args]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None:
        return None
    paths = (card.text, f"reproductions/{card.slug}/paper.toml", ":(glob)minilib/**/*.py")
    return f"{head}-dirty" if git("status", "--porcelain", "--", *paths) else head


def dump_record(record: Mapping[str, Any]) -> str:
    """A record as the text of its file."""
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_all(files: Mapping[Path, str]) -> None:
    """Write several files or none: if one cannot be written, those before it get their old contents back."""
    old = {path: path.read_bytes() if path.is_file() else None for path in files}
    done: list[Path] = []
    try:
        for path, data in files.items():
            atomic_write(path, data)
            done.append(path)
    except BaseException:
        for path in done:
            before = old[path]
            if before is None:
                path.unlink(missing_ok=True)
            else:
                atomic_write(path, before)
        raise


def end_cleanly() -> None:
    """Make SIGTERM an ordinary exit, so that the kernel is stopped and temporary folders are removed."""

    def leave(*_: Any) -> None:
        sys.exit("stopped by SIGTERM")

    signal.signal(signal.SIGTERM, leave)


def end_with(pid: int, every: float = 1.0) -> None:
    """End this process soon after another one has died: a fleet killed at once leaves no page running."""

    def watch() -> None:
        while True:
            time.sleep(every)
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=watch, daemon=True).start()


def log_to_terminal() -> None:
    """Show papermill's progress, a line a cell, on standard output."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
