"""Two pages of this repository through the graph and papermill, the way they are published."""

import json
import os
import subprocess
import sys

import pytest

from minilib import consistency, pages
from minilib.cards import all_cards
from minilib.execution import page_text
from minilib.resources import repo_root

pytestmark = pytest.mark.slow
ROOT = repo_root()


def two_cards():
    """The quickest page that loads a checkpoint, so that the whole graph is walked, and the quickest other one."""
    cards = sorted(all_cards(ROOT), key=lambda card: (card.minutes["smoke"], card.part, card.order))
    first = next((card for card in cards if card.zoo), cards[0])
    return {card.slug: card for card in (first, next(card for card in cards if card != first))}


def test_two_pages_through_the_graph(tmp_path):
    cards = two_cards()
    results = tmp_path / "results"
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--cores", "1"]
    command += ["--config", "profile=smoke", f"results={results}", "--"]
    command += [str(results / "smoke" / f"{slug}.json") for slug in cards]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MINILIB_", "PYTEST_"))}

    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    for slug, card in cards.items():
        record = json.loads((results / "smoke" / f"{slug}.json").read_text())
        notebook = pages.read_notebook(results / "smoke" / f"{slug}.ipynb")
        assert consistency.record_problems(record, card, "smoke", page_text(card, ROOT)) == []
        assert pages.never_ran(notebook) == [] and pages.embedded_record(notebook) == record
        assert set(record["zoo"]) == set(card.zoo)
        assert all((results / "zoo" / f"{name}.ok").exists() for name in card.zoo)

    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert "Nothing to be done" in done.stdout + done.stderr
