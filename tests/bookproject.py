"""For the tests of the book: the site of this repository, built once, and a small project with a book of its own."""

# ruff: noqa: E501

import json
import shutil
import subprocess
import sys
from pathlib import Path

import miniproject

REPO = miniproject.REPO
sys.path.insert(0, str(REPO / "book"))  # build, check and derive are the book's own modules

URL = "https://github.com/someone/something"
PART = "06-experts"

# Has one of everything that CONTRIBUTING.md has a recipe for.
PAGE = r"""# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The {slug} page
#
# The idea in one sentence, from {{cite:t}}`{slug}`, on the model of {{cite:t}}`peebles2023scalable`.

# %% tags=["remove-cell"]
# On Colab this installs the library.
try:
    import minilib  # noqa: F401
except ImportError:
    # %pip install -q "minilib @ git+{url}"
    pass

# %% tags=["parameters"]
profile = "auto"

# %%
from dataclasses import dataclass

from minilib.reproduction import Reproduction


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]


settings = {{"smoke": Settings((0,)), "cpu": Settings((0, 1, 2)), "gpu": Settings((0, 1, 2))}}
run = Reproduction("{slug}", profile, settings)
run.show_card()

# %% [markdown]
# (sec-{slug}-idea)=
# ## The zymurgy of gates
#
# $$
# x_t = \alpha_t\, x_0 + \sigma_t\, \epsilon
# $$ (eq-{slug}-forward)
#
# {{eq}}`eq-{slug}-forward` is drawn in {{numref}}`fig-{slug}-line`; see {{doc}}`/conventions` and {{ref}}`sec-{slug}-idea`.
#
# :::{{note}}
# A note, with {{cite}}`{slug}`.
# :::
#
# :::{{admonition}} In the released code
# :class: tip
# The line as read.
# :::

# %% tags=["hide-input"] mystnb={{"image": {{"alt": "A line that rises from 0 to 1."}}, "figure": {{"caption": "A line over $t$.", "name": "fig-{slug}-line"}}}}
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(3, 2))
ax.plot([0, 1])
plt.show()

# %% [markdown]
# ## Results

# %%
run.record("sum", 2)
run.record("gain", [1.75 + 0.01 * seed for seed in run.settings.seeds])
run.report()

# %% [markdown]
# ## Exercises
#
# **1.** How much is one and one?

# %% tags=["hide-cell"] mystnb={{"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}}
print(1 + 1)

# %% [markdown]
# :::{{dropdown}} Solution 1: in words
# Two.
# :::
"""


def build(root: Path, slug: str = "dummy") -> Path:
    """A copy of the recording half of the repository and of the book, with no card but one."""
    empty(root)
    add_paper(root, slug)
    return root


def empty(root: Path) -> Path:
    """The same without any card."""
    miniproject.build(root)
    for folder in ("reproductions", "notebooks"):
        shutil.rmtree(root / folder)
        (root / folder).mkdir()
    shutil.copytree(REPO / "book", root / "book", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pyproject.toml").write_text(f'[project]\nname = "p"\n[project.urls]\nRepository = "{URL}"\n')
    return root


def add_paper(root: Path, slug: str) -> tuple[Path, Path]:
    """Write the two files of a paper: its card and its page's text."""
    card = root / f"reproductions/{slug}/paper.toml"
    text = root / f"notebooks/{PART}/{slug}.py"
    miniproject.write(card, miniproject.CARD.format(slug=slug, part=PART, order=1, zoo="[]"))
    miniproject.write(text, PAGE.format(slug=slug, url=URL))
    return card, text


def build_book(root: Path, *args: str) -> subprocess.CompletedProcess:
    """``python book/build.py`` in a project; the caller looks at its exit code."""
    return miniproject.run(root, sys.executable, "book/build.py", *args, check=False)


def site() -> Path:
    """The built site of this repository: built here if it is not up to date. ``make book`` then finds nothing to do."""
    done = build_book(REPO)
    assert done.returncode == 0, done.stderr
    return REPO / "build" / "site" / "html"


def pages() -> list[Path]:
    """Committed notebooks of this repository."""
    return sorted(REPO.glob("notebooks/*/*.ipynb"))


def edit_json(path: Path, **changes: object) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
