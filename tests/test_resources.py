import ast
import os
import stat
from pathlib import Path

import pytest

from minilib import resources

ROOT = Path(__file__).parents[1]


def test_atomic_write_replaces_whole_files_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.txt"
    resources.atomic_write(path, "one")
    resources.atomic_write(path, b"two")
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        resources.atomic_write(path, "three")
    monkeypatch.undo()
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]


def test_places():
    assert resources.repo_root() == ROOT
    assert resources.reproductions_dir() == ROOT / "reproductions"
    assert resources.constraints_path().read_text().rstrip().endswith("torch==2.13.0")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "minilib").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_modules_stay_rooms_not_halls(path):
    text = path.read_text()
    assert text.count("\n") <= 350, "split this module"
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.end_lineno - node.body[0].lineno - (
                node.body[0].end_lineno - node.body[0].lineno if isinstance(node.body[0], ast.Expr) else 0
            )  # fmt: skip
            assert body <= 60, f"{node.name} is {body} lines long"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "cuda" or node.args, f"line {node.lineno}: .cuda() breaks the CPU"


def test_importing_a_page_s_needs_is_light():
    """No diffusers, scikit-learn, matplotlib, accelerate or snakemake at import time."""
    import subprocess
    import sys

    code = (
        "import sys, minilib.training, minilib.losses, minilib.sampling, minilib.guidance, minilib.arms, minilib.zoo;"
        "import minilib.data, minilib.metrics, minilib.models, minilib.schedulers, minilib.reproduction;"
        "import minilib.plotting, minilib.recipes;"
        "heavy = ('diffusers', 'sklearn', 'matplotlib', 'accelerate', 'snakemake', 'transformers', 'scipy.stats');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
