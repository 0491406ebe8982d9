"""The guard that fails a run of the pages when one of them was not really executed: both sides of it."""

import json
import shutil
import sys
import time

import miniproject
import pytest

pytestmark = pytest.mark.slow
NBVAL = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-q", "-p", "no:cacheprovider"]


@pytest.fixture
def project(tmp_path):
    """The small project with its notebooks written, not executed."""
    root = miniproject.build(tmp_path / "project")
    shutil.copy(miniproject.REPO / "notebooks" / "conftest.py", root / "notebooks" / "conftest.py")
    return root


def nbval(root, *args):
    miniproject.publish(root, "sync")
    return miniproject.run(root, *NBVAL, "notebooks", *args, check=False, timeout=300)


def receipts(root, since):
    folder = str(root / "results/smoke/receipts")
    return miniproject.publish(root, "receipts", folder, "--since", str(since), check=False)


def test_pages_that_ran_pass(project):
    started = time.time()
    done = nbval(project, "-n", "2", "--dist", "loadfile")
    assert done.returncode == 0, done.stdout
    checked = receipts(project, started)
    assert checked.returncode == 0 and "every page really ran" in checked.stdout
    receipt = json.loads((project / "results/smoke/receipts/beta.json").read_text())
    assert receipt["slug"] == "beta" and receipt["profile"] == "smoke" and receipt["wall_s"] > 0
    assert receipt["recorded"] == ["gain", "sum"] and receipt["started"] > started

    late = receipts(project, time.time())
    assert late.returncode == 1
    assert "beta: its receipt is of" in late.stderr and "before this run began" in late.stderr


def test_pages_that_did_not_run_fail(project):
    started = time.time()
    # One cell kept from running; a report never called; a failure is left as nbval reports it.
    miniproject.replace(miniproject.page(project, "alpha"), 'print("first")', 'print("first")  # NBVAL_SKIP')
    miniproject.replace(miniproject.page(project, "alpha"), "# %%\nprint", '# %% tags=["nbval-skip"]\nprint')
    miniproject.replace(miniproject.page(project, "beta"), "run.report()", "run.as_record()")
    done = nbval(project)
    assert done.returncode == 1, done.stdout
    end = done.stdout.split("pages that did not really run")[1]
    assert "alpha.ipynb: 4 of its 5 code cells were executed" in end
    assert "beta.ipynb: it left no receipt" in end
    assert "gamma" not in end
    assert "failed" not in done.stdout.splitlines()[-1], "nbval itself had nothing to say"

    checked = receipts(project, started)
    assert checked.returncode == 1 and "beta: no receipt" in checked.stderr and "gamma" not in checked.stderr


CLUMSY = """
from nbval import kernel

inner, starts = kernel.start_new_kernel, []


def start_new_kernel(*args, **kwargs):
    starts.append(1)
    if len(starts) <= {failures}:
        raise RuntimeError("Kernel died before replying to kernel_info")
    return inner(*args, **kwargs)


kernel.start_new_kernel = start_new_kernel
"""


@pytest.mark.parametrize("failures, passes", [(2, True), (3, False)])
def test_a_kernel_that_did_not_come_up_is_started_again(project, failures, passes):
    (project / "clumsy.py").write_text(CLUMSY.format(failures=failures))
    done = nbval(project, "-p", "clumsy", "-k", "alpha.ipynb")
    assert (done.returncode == 0) == passes, done.stdout
    assert ("Kernel died before replying" in done.stdout) != passes, "the last failure is nbval's to report"


def test_flagged_cells_are_compared_with_the_published_outputs(project):
    page = miniproject.page(project, "gamma")
    flagged = "# %%\n# NBVAL_CHECK_OUTPUT\nprint('right')\n\n# %%\n# NBVAL_CHECK_OUTPUT\nprint('published before')\n"
    page.write_text(page.read_text() + "\n" + flagged)
    miniproject.publish(project, "gamma", "--profile", "cpu")
    notebook = project / "notebooks/04-caching/gamma.ipynb"
    data = json.loads(notebook.read_text())
    data["cells"][-1]["outputs"][0]["text"] = ["another output\n"]
    notebook.write_text(json.dumps(data))
    done = miniproject.run(project, *NBVAL, str(notebook), check=False, timeout=300)
    assert done.returncode == 1
    assert "1 failed, 6 passed" in done.stdout and "Cell outputs differ" in done.stdout, done.stdout
    assert "another output" in done.stdout and "published before" in done.stdout


def test_a_receipt_without_time_or_of_another_profile_fails(project):
    folder = project / "results/smoke/receipts"
    now = time.time()
    good = {"slug": "alpha", "profile": "smoke", "wall_s": 1.0, "started": now, "recorded": ["sum"]}
    for slug, change in {"alpha": {}, "beta": {"wall_s": 0.0}, "gamma": {"profile": "cpu"}}.items():
        miniproject.write(folder / f"{slug}.json", json.dumps(good | {"slug": slug} | change))
    done = receipts(project, now)
    assert done.returncode == 1 and "alpha" not in done.stderr
    assert "beta: its receipt has no wall time" in done.stderr
    assert "gamma: ran in profile 'cpu', expected 'smoke'" in done.stderr
