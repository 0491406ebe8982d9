"""A small copy of the repository for tests: the recording half of minilib, three cards with trivial pages, the Snakefile.

Its ``minilib/__init__.py`` leaves torch out, so that a page takes about two CPU-seconds.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from minilib import keys

REPO = Path(__file__).resolve().parents[1]

CARD = """slug = "{slug}"
title = "The {slug} paper"
authors = ["A. Author"]
year = 2024
part = "{part}"
order = {order}
summary = "An idea."
stands_in = "A list of numbers stands in for everything."
zoo = {zoo}

[[claims]]
id = "sum"
statement = "One and one are two"
paper = "2"
kind = "exact"
metric = "sum"
direction = "within"
threshold = [2, 2]
asserted_in = ["smoke", "cpu", "gpu"]

[[claims]]
id = "gain"
statement = "It gains more than a half"
paper = "2.3x"
kind = "quality"
metric = "ratio"
direction = "at_least"
threshold = 1.5
null = 1.0
seeds = 3
asserted_in = ["cpu", "gpu"]
"""

PAGE = """# %% [markdown]
# # The {slug} paper

# %% tags=["parameters"]
profile = "auto"

# %%
import sys
from dataclasses import dataclass

from minilib import toy
from minilib.reproduction import Reproduction


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]


settings = {{"smoke": Settings((0,)), "cpu": Settings((0, 1, 2)), "gpu": Settings((0, 1, 2))}}
run = Reproduction("{slug}", profile, settings)
run.show_card()
run.show_settings()

# %%
print("first")
print("noise", file=sys.stderr)
print("second")

# %%
total = toy.add(1, 1)  # the experiment

# %%
run.record("sum", total)
run.record("gain", [1.75 + 0.01 * seed for seed in run.settings.seeds])
run.report()
"""

PAGES = {"alpha": "00-foundations", "beta": "04-caching", "gamma": "04-caching"}
WEIGHTS = b"weights"


def build(root: Path) -> Path:
    """Write the project into an empty folder."""
    package = root / "minilib"
    (package / "assets" / "zoo").mkdir(parents=True)
    for name in sorted(keys.BOOKKEEPING):
        source = REPO / Path(*name.split(".")).with_suffix(".py")
        shutil.copy(source, package / source.name)
    (package / "__init__.py").write_text('__version__ = "0"\n')
    (package / "toy.py").write_text("def add(a, b):\n    return a + b\n")
    (package / "zoo.py").write_text(ZOO)
    (package / "assets" / "zoo" / "tiny.safetensors").write_bytes(WEIGHTS)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    (package / "assets" / "zoo" / "zoo.toml").write_text(
        f'[tiny]\nfile = "tiny.safetensors"\nsha256 = "{digest}"\n'
    )
    (root / "pyproject.toml").write_text("[project]\n")
    (root / "constraints.txt").write_text("numpy==2.4.6\n")
    shutil.copytree(REPO / "profiles", root / "profiles")
    shutil.copy(REPO / "Snakefile", root / "Snakefile")
    for order, (slug, part) in enumerate(PAGES.items()):
        zoo = '["tiny"]' if slug == "alpha" else "[]"
        write(
            root / f"reproductions/{slug}/paper.toml", CARD.format(slug=slug, part=part, order=order, zoo=zoo)
        )
        write(root / f"notebooks/{part}/{slug}.py", PAGE.format(slug=slug))
    return root


ZOO = """import hashlib
import pathlib
import sys

from minilib.keys import known_checksums
from minilib.resources import zoo_dir

for name in sys.argv[2:]:
    found = hashlib.sha256((zoo_dir() / f"{name}.safetensors").read_bytes()).hexdigest()
    sys.exit(0 if found == known_checksums()[name] else f"{name}: wrong checksum")
"""


def write(path: Path, text: str) -> None:
    """Write a file, its folder too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def page(root: Path, slug: str) -> Path:
    """Path of a page's text."""
    return root / f"notebooks/{PAGES[slug]}/{slug}.py"


def replace(path: Path, old: str, new: str) -> None:
    """Edit a file; the old text must be there."""
    text = path.read_text()
    assert old in text, f"{path} has no {old!r}"
    path.write_text(text.replace(old, new))


def environment(root: Path) -> dict[str, str]:
    """An environment in which ``minilib`` and ``python`` are the project's."""
    unwanted = ("MINILIB_", "PYTEST_", "SNAKEMAKE_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return env | {"PATH": path, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def run(root: Path, *args: str, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Run a command in the project, output captured."""
    done = subprocess.run(args, cwd=root, env=environment(root), capture_output=True, text=True, **kwargs)
    if check and done.returncode:
        raise AssertionError(f"{args} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def publish(root: Path, *args: str, **kwargs) -> subprocess.CompletedProcess:
    """``python -m minilib.publish`` in the project."""
    return run(root, sys.executable, "-m", "minilib.publish", *args, **kwargs)
