"""The graph of pages: what runs again, what a failure and a kill leave behind, and the same graph on every executor."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import miniproject
import pytest

SNAKEMAKE = [sys.executable, "-m", "snakemake"]
LOCAL = ["--profile", "profiles/local", "--config", "profile=smoke"]


def fleet(root, *args, profile="local", check=True):
    config = ["--profile", f"profiles/{profile}", "--config", "profile=smoke"]
    return miniproject.run(root, *SNAKEMAKE, *config, *args, check=check, timeout=300)


def ran(done):
    """Names of the jobs that a run (or dry run) lists, pages by slug."""
    lines = (done.stdout + done.stderr).splitlines()
    jobs, rule = set(), None
    for line in lines:
        words = line.split()
        if words[:1] in (["rule"], ["localrule"]):
            rule = words[1].rstrip(":")
        elif words[:1] == ["output:"] and rule:
            jobs.add(Path(words[1].rstrip(",")).stem if rule == "page" else rule)
    return jobs


def dated(root):
    """When each page was last executed."""
    return {
        slug: json.loads((root / f"results/smoke/{slug}.json").read_text())["date"]
        for slug in miniproject.PAGES
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project whose fleet has run."""
    root = miniproject.build(tmp_path_factory.mktemp("fleet") / "project")
    done = fleet(root)
    assert ran(done) == {"zoo", "alpha", "beta", "gamma", "dashboard"}
    return root


@pytest.fixture
def project(finished, tmp_path):
    """A copy of it, to change."""
    return Path(shutil.copytree(finished, tmp_path / "project"))


def test_all_pages_and_the_dashboard(finished):
    rows = (finished / "results/smoke/dashboard.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 2
    assert rows[1].startswith("alpha,00-foundations,sum,exact,confirmed,2.0,,,1,2.0..2.0,,smoke,")
    assert rows[2].startswith("alpha,00-foundations,gain,quality,inconclusive,1.75,,,1,1.5,1.0,smoke,")
    for slug in miniproject.PAGES:
        assert "cpu_time" in (finished / f"results/smoke/logs/{slug}.tsv").read_text()
    assert not (finished / "notebooks/04-caching/beta.ipynb").exists(), "the fleet does not publish"


def test_touching_runs_nothing(project):
    for path in [
        *project.glob("notebooks/*/*.py"),
        *project.glob("reproductions/*/*"),
        *project.rglob("minilib/**/*.py"),
    ]:
        path.touch()
    done = fleet(project)
    assert "Nothing to be done" in done.stdout + done.stderr


def test_a_changed_cell_runs_that_page_and_the_dashboard(project):
    before = dated(project)
    time.sleep(1)
    miniproject.replace(miniproject.page(project, "beta"), "1.75 +", "1.25 +")
    assert ran(fleet(project)) == {"beta", "dashboard"}
    after = dated(project)
    assert after["beta"] > before["beta"]
    assert (after["alpha"], after["gamma"]) == (before["alpha"], before["gamma"])
    assert ",1.25," in (project / "results/smoke/dashboard.csv").read_text()


def test_a_changed_card_runs_that_page(project):
    miniproject.replace(project / "reproductions/gamma/paper.toml", "threshold = 1.5", "threshold = 1.6")
    # Another checkpoint's entry: the zoo is verified again, but alpha's own checkpoint is the same.
    with (project / "minilib/assets/zoo/zoo.toml").open("a") as file:
        file.write('[other]\nfile = "other.safetensors"\nsha256 = "0"\n')
    # The recorder writes numbers down; it makes none.
    miniproject.replace(project / "minilib/tables.py", "import textwrap\n", "import textwrap\n\nUNUSED = 1\n")
    assert ran(fleet(project, "-n")) == {"gamma", "dashboard", "zoo"}


def test_a_changed_module_runs_the_pages_that_import_it(project):
    miniproject.replace(miniproject.page(project, "alpha"), "toy.add(1, 1)", "2")
    miniproject.replace(miniproject.page(project, "alpha"), "from minilib import toy\n", "")
    miniproject.replace(project / "minilib/toy.py", "a + b", "b + a")
    done = fleet(project, "-n")
    assert ran(done) == {"alpha", "beta", "gamma", "dashboard"}
    inputs = {outputs.split(",")[0]: inputs for _, inputs, outputs in graph(done)}
    assert "minilib/toy.py" in inputs["results/smoke/beta.ipynb"]
    assert "minilib/toy.py" not in inputs["results/smoke/alpha.ipynb"], "alpha no longer imports it"


def test_a_failing_page_is_named_and_the_others_finish(project):
    before = dated(project)
    time.sleep(1)
    miniproject.replace(miniproject.page(project, "alpha"), "toy.add(1, 1)", "1 / 0")
    miniproject.replace(miniproject.page(project, "gamma"), "toy.add(1, 1)", "toy.add(2, 0)")
    done = fleet(project, check=False)
    assert done.returncode != 0
    end = (done.stdout + done.stderr).split("Failed pages: ")[1]
    assert end.startswith("1\n") and "alpha: see results/smoke/logs/alpha.log" in end
    assert "ZeroDivisionError" in end and "gamma" not in end.split("Complete log")[0]
    assert dated_or_none(project, "gamma") > before["gamma"], "the others finish"
    assert dated_or_none(project, "alpha") is None
    assert "ZeroDivisionError" in (project / "results/smoke/logs/alpha.failed.ipynb").read_text()

    miniproject.replace(miniproject.page(project, "alpha"), "1 / 0", "2")
    assert ran(fleet(project)) == {"alpha", "dashboard"}
    assert not (project / "results/smoke/logs/alpha.failed.ipynb").exists()


def dated_or_none(root, slug):
    path = root / f"results/smoke/{slug}.json"
    return json.loads(path.read_text())["date"] if path.exists() else None


def test_killed_at_once_it_resumes_with_the_same_command(project):
    page, log = miniproject.page(project, "beta"), project / "results/smoke/logs/beta.log"
    miniproject.replace(page, "toy.add(1, 1)", "__import__('time').sleep(100)")
    log.unlink()
    first = subprocess.Popen(
        [*SNAKEMAKE, *LOCAL], cwd=project, env=miniproject.environment(project), stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: "Executing Cell 6" in read(log))
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert not (project / "results/smoke/beta.json").exists()
    wait_for(lambda: "stopped by SIGTERM" in read(log))  # the page ends with its fleet
    miniproject.replace(page, "__import__('time').sleep(100)", "toy.add(1, 1)")
    assert ran(fleet(project)) == {"beta", "dashboard"}


def read(path):
    return path.read_text() if path.exists() else ""


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def test_two_fleets_do_not_run_in_one_place(project):
    before = dated(project)
    miniproject.replace(miniproject.page(project, "beta"), "1.75 +", "1.25 +")
    with (project / "results/smoke/.fleet.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = fleet(project, check=False)
    assert done.returncode != 0
    assert "another fleet is running" in done.stdout + done.stderr
    assert dated(project) == before


def graph(done):
    """The jobs of a dry run: what each makes, from what, in which order they are listed."""
    text = done.stdout + done.stderr
    jobs = re.findall(r"^(?:local)?rule (\w+):\n    input: (.*)\n(?:    output: (.*)\n)?", text, re.MULTILINE)
    return sorted(jobs)


def test_the_graph_is_the_same_on_every_executor(finished):
    graphs = {
        profile: graph(fleet(finished, "--forceall", "--dry-run", profile=profile))
        for profile in ("local", "slurm", "generic")
    }
    assert [rule for rule, _, _ in graphs["local"]] == ["all", "dashboard", "page", "page", "page", "zoo"]
    assert graphs["slurm"] == graphs["local"]
    assert graphs["generic"] == graphs["local"]
    # A dry run on Kubernetes asks for the bucket that stands in for a shared disk; its graph does not.
    dags = {
        profile: fleet(finished, "--forceall", "--dag", profile=profile).stdout
        for profile in ("local", "kubernetes")
    }
    assert dags["local"].count("page") == 3
    assert dags["kubernetes"] == dags["local"]


def test_a_real_run_through_a_submit_command(tmp_path):
    root = miniproject.build(tmp_path / "project")
    done = fleet(root, "--", "results/smoke/alpha.json", profile="generic")
    assert ran(done) == {"zoo", "alpha"}
    assert (done.stdout + done.stderr).count("with external jobid") == 2
    assert dated_or_none(root, "alpha")
