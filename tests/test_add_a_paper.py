"""The promise of book/add-a-paper.md: two files make a page, and everything else follows from them."""

import sys
from pathlib import Path

import bookproject
import miniproject
import pytest

# What runs and builds leave behind; none of it is committed.
UNTRACKED = {"results", "build", ".snakemake", "__pycache__", ".pytest_cache"}


def files(root: Path) -> set[str]:
    """Files of a project that would be committed."""
    paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {str(path) for path in paths if not UNTRACKED & set(path.parts)}


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """A project before and after a paper was added and published: its folder, old files, files written, all files."""
    root = bookproject.empty(tmp_path_factory.mktemp("paper"))
    before = files(root)
    written = {str(path.relative_to(root)) for path in bookproject.add_paper(root, "newcomer")}
    miniproject.publish(root, "newcomer", "--profile", "cpu")
    done = bookproject.build_book(root)
    assert done.returncode == 0, done.stderr
    return root, before, written, files(root)


def test_two_files_are_written_and_two_are_made(added):
    _, before, written, after = added
    assert written == {"reproductions/newcomer/paper.toml", "notebooks/06-experts/newcomer.py"}
    assert after - before - written == {
        "reproductions/newcomer/cpu.json",
        "notebooks/06-experts/newcomer.ipynb",
    }


def test_the_repository_is_consistent(added):
    miniproject.publish(added[0], "check")


def test_the_page_is_in_the_book(added):
    site = added[0] / "build/site/html"
    page = (site / "notebooks/06-experts/newcomer.html").read_text()
    assert 'alt="A line that rises from 0 to 1."' in page
    assert (
        f"{bookproject.URL.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/main"
        in page
    )
    for contents in ("intro.html", "parts/06-experts.html", "results.html"):
        assert "newcomer.html" in (site / contents).read_text(), contents


def test_its_claims_are_on_the_results_page(added):
    results = (added[0] / "build/site/html/results.html").read_text()
    assert '<tr id="newcomer"' in results
    assert "It gains more than a half" in results and "1.76" in results and "One and one are two" in results


def test_it_is_in_the_bibliography(added):
    references = (added[0] / "build/site/html/references.html").read_text()
    assert "The newcomer paper" in references and "Scalable Diffusion Models with Transformers" in references


def test_its_words_are_found_by_the_search(added):
    assert "zymurgi" in (added[0] / "build/site/html/searchindex.js").read_text()


def test_the_fleet_runs_it(added):
    target = "results/smoke/newcomer.json"
    done = miniproject.run(
        added[0], "snakemake", "-n", "--cores", "1", "--config", "profile=smoke", "--", target
    )
    assert target in done.stdout and "rule page" in done.stdout


def test_the_tests_run_it(added):
    # Paths as in `make test`; the options of pyproject.toml are not in this small project.
    options = ("--collect-only", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env")
    done = miniproject.run(added[0], sys.executable, "-m", "pytest", *options, "notebooks")
    assert "notebooks/06-experts/newcomer.ipynb" in done.stdout
