"""The pages of this repository: cards, texts, notebooks and records agree, and every page has what a page must have."""

import ast
import re

import jupytext
import pytest

from minilib import consistency, keys, pages
from minilib.cards import PROFILES, all_cards
from minilib.execution import page_text
from minilib.resources import repo_root

ROOT = repo_root()
CARDS = all_cards(ROOT)
each_page = pytest.mark.parametrize("card", CARDS, ids=[card.slug for card in CARDS])


def test_there_are_pages():
    assert CARDS, "no card in reproductions/"


def test_everything_agrees():
    problems, _ = consistency.check(ROOT)
    assert problems == [], "\n".join(problems)


@each_page
def test_cells_are_read_as_jupytext_reads_them(card):
    text = page_text(card, ROOT)
    theirs = [
        cell.source for cell in jupytext.reads(text, fmt="py:percent").cells if cell.cell_type == "code"
    ]
    ours = [re.sub(r"^(\s*)# %(?=\w)", r"\1%", cell, flags=re.MULTILINE) for cell in keys.code_cells(text)]
    assert ours == [source.strip() for source in theirs if source.strip()]


@each_page
def test_a_page_has_its_parts(card):
    text = page_text(card, ROOT)
    cells = keys.code_cells(text)
    assert "import minilib" in cells[0] and "except ImportError" in cells[0] and "%pip install" in cells[0]
    assert 'profile = "auto"' in cells, "the parameters cell sets nothing else"
    for call in ("show_card()", "show_settings()", "report()"):
        assert len(re.findall(rf"\brun\.{re.escape(call)}", text)) == 1, f"run.{call} exactly once"
    assert re.search(rf'Reproduction\(\s*"{card.slug}",\s*profile\b', text), "profile is passed on"
    assert "# NBVAL_CHECK_OUTPUT" in text, "at least one cell prints the same everywhere and is compared"
    missing = [name for name in PROFILES if f'"{name}": ' not in text]
    assert not missing, f"no settings for {missing}"


@each_page
def test_only_the_recorder_knows_the_profile(card):
    """Settings may depend on the profile; nothing else on a page may."""
    tree = ast.parse(page_text(card, ROOT))
    uses = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "profile"]
    assert len(uses) == 2, "`profile` is set once and passed on once"
    steering = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    assert "run.profile" not in steering, "put what differs between profiles into the settings"


@each_page
def test_a_notebook_opens_with_python3_and_holds_no_path(card):
    notebook = pages.read_notebook(ROOT / card.notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    raw = (ROOT / card.notebook).read_text()
    assert str(ROOT) not in raw and "/tmp/" not in raw, "a path of the machine it ran on"
