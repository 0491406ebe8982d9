"""The wheel alone, as on Colab: it leaves torch as it is, carries cards and checkpoints, and a page runs in an empty folder."""

import os
import subprocess
import sys
import zipfile
from importlib import metadata

import nbformat
import pytest

from minilib import pages
from minilib.cards import all_cards
from minilib.execution import page_text
from minilib.resources import repo_root

pytestmark = pytest.mark.slow
ROOT = repo_root()


def run(*args, cwd, **env):
    unwanted = ("MINILIB_", "PYTEST_", "PYTHONPATH")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    done = subprocess.run(args, cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (path,) = folder.glob("minilib-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(target),
        str(wheel),
        cwd=target,
    )
    return target


def test_it_carries_what_pages_need(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"minilib/_reproductions/{card.slug}/paper.toml" for card in all_cards(ROOT)}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "minilib/assets/zoo").iterdir()}
    wanted |= {"minilib/_constraints.txt", "minilib/assets/zoo/zoo.toml"}
    assert wanted <= names
    assert len(wanted) > 3
    assert not any(name.startswith(("tests/", "notebooks/", "results/")) for name in names)


def test_no_dependency_caps_torch_or_numpy():
    requirements = [line for line in metadata.requires("minilib") if "extra ==" not in line]
    found = {line.split(">")[0].split("=")[0].strip(): line for line in requirements}
    for name in ("torch", "numpy"):
        assert not any(sign in found[name] for sign in ("<", "==", "~", "!")), found[name]


def test_installing_it_leaves_torch_alone(wheel, tmp_path):
    args = ["install", "--dry-run", "--no-index", "--disable-pip-version-check", str(wheel)]
    out = run(sys.executable, "-m", "pip", *args, cwd=tmp_path)
    (would,) = [line for line in out.splitlines() if line.startswith("Would install")]
    assert would.split() == ["Would", "install", f"minilib-{metadata.version('minilib')}"]
    assert "Requirement already satisfied: torch>=" in out


def test_a_page_runs_in_an_empty_folder(installed, tmp_path):
    cards = {card.slug: card for card in all_cards(ROOT)}
    card = cards.get("noise-and-back") or next(iter(cards.values()))
    notebook = pages.notebook_of(page_text(card, ROOT))
    notebook.cells.append(nbformat.v4.new_code_cell("import minilib\nprint(minilib.__file__)"))
    empty, source, target = tmp_path / "empty", tmp_path / "in.ipynb", tmp_path / "out.ipynb"
    empty.mkdir()
    source.write_text(pages.dump_notebook(notebook))
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(source),
        str(target),
        "-k",
        "python3",
        "-p",
        "profile",
        "smoke",
    ]
    command += ["--cwd", str(empty), "--no-progress-bar", "--start-timeout", "300"]
    run(*command, cwd=empty, PYTHONPATH=str(installed), OMP_NUM_THREADS="1", MINILIB_JOBS="1")
    executed = pages.read_notebook(target)
    assert pages.never_ran(executed) == []
    assert pages.embedded_record(executed)["slug"] == card.slug
    assert executed.cells[-1].outputs[0].text.strip() == str(installed / "minilib" / "__init__.py")
    assert list(empty.iterdir()) == [], "a page writes nothing where it runs"
