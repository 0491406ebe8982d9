"""Build the book from the committed pages, cards and records. Nothing is run, and nothing in the source tree is written.

    python book/build.py                                       the whole book, in build/site/html
    python book/build.py --results results/cpu --page dit-moe  with fresh runs in place of the committed ones

The second form leaves its site in results/cpu/site/html. A second call does nothing when nothing has changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from check import check
from derive.shelf import read_shelf
from derive.stage import stage
from minilib.execution import alone

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("jupyter-book", "sphinx", "myst-nb", "sphinx-book-theme", "pydata-sphinx-theme", "sphinx-design")


class BuildError(RuntimeError):
    """The book could not be built; the message says why."""


def build(root: Path, out: Path, results: Path | None = None, profile: str = "cpu") -> bool:
    """Bring ``out/html`` up to date; whether there was anything to do.

    The site is replaced only by one that was built without a warning and passed every check.
    """
    out.mkdir(parents=True, exist_ok=True)
    with alone(out / ".lock", "book"):
        files = stage(read_shelf(root, results, profile))
        key = content_key(files, root)
        stamp, site = out / ".key", out / "html"
        if site.is_dir() and stamp.is_file() and stamp.read_text() == key:
            return False
        # Sphinx does not repeat the warnings of pages it has in its cache, so every build is a whole one.
        source = out.parent / "book"
        write_files(source, files)
        run_jupyter_book(source)
        fresh = source / "_build" / "html"
        faults = check(fresh.resolve())
        if faults:
            raise BuildError("\n".join(faults))
        stamp.unlink(missing_ok=True)
        shutil.rmtree(site, ignore_errors=True)
        os.replace(fresh, site)
        stamp.write_text(key)
        return True


def content_key(files: dict[str, bytes], root: Path) -> str:
    """sha256 over everything the site depends on: the staged files, the programs that build it, and this code."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{hashlib.sha256(files[name]).hexdigest()}\0".encode())
    for tool in TOOLS:
        digest.update(f"{tool}=={metadata.version(tool)}\0".encode())
    for name in ("build.py", "check.py"):
        digest.update((root / "book" / name).read_bytes())
    return digest.hexdigest()


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Make a folder hold exactly these files."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def run_jupyter_book(source: Path) -> None:
    """Strict build of a staged book into ``_build/html`` below it; a warning is an error."""
    # The environment's own programs first: a jupyter-book elsewhere on the path is another version.
    script = Path(sys.executable).parent / "jupyter-book"
    command = [str(script), "build", str(source), "-W", "--keep-going", "--builder", "html", "-q"]
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line]
    if done.returncode or warnings:
        raise BuildError("\n".join(warnings) or f"{done.stdout}\n{done.stderr}")


def main() -> int:
    """Build, and say where the book is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--profile", default="cpu", help="profile of the run that the pages show (default: cpu)"
    )
    parser.add_argument("--results", type=Path, help="folder of fresh runs: <slug>.ipynb and <slug>.json")
    parser.add_argument(
        "--out", type=Path, help="the site goes to OUT/html (default: build/site, or site in RESULTS)"
    )
    parser.add_argument("--page", help="slug of a page: print where that page is")
    given = parser.parse_args()
    # Fresh runs get a site of their own: the book of the committed pages stays as it is.
    out = (given.out or (given.results or ROOT / "build") / "site").resolve()
    try:
        built = build(ROOT, out, given.results, given.profile)
    except (BuildError, ValueError) as error:
        print(f"The book was not built:\n{error}", file=sys.stderr)
        return 1
    pages = [out / "html" / "index.html"]
    if given.page:
        pages = sorted((out / "html" / "notebooks").glob(f"*/{given.page}.html"))
        if not pages:
            print(
                f"no page {given.page!r} in the book: it has not been run, or there is no such card",
                file=sys.stderr,
            )
            return 1
    print(f"{'built' if built else 'up to date'}: {pages[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
