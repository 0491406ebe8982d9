"""Executing and publishing pages: both files or neither, nothing twice, and a check that sees through edits."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import miniproject
import nbformat
import pytest
from miniproject import publish, replace

from minilib import consistency, execution, pages
from minilib.reproduction import MIME

NOTEBOOK, RECORD = "notebooks/00-foundations/alpha.ipynb", "reproductions/alpha/cpu.json"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A project with alpha as its only card, published once."""
    root = miniproject.build(tmp_path_factory.mktemp("publish") / "project")
    for slug in ("beta", "gamma"):
        shutil.rmtree(root / "reproductions" / slug)
        miniproject.page(root, slug).unlink()
    done = publish(root, "alpha", "--profile", "cpu")
    assert f"alpha (cpu): executed; wrote {NOTEBOOK} and {RECORD}" in done.stdout
    return root


@pytest.fixture
def project(published, tmp_path):
    """A copy of it, to change."""
    return Path(shutil.copytree(published, tmp_path / "project"))


def state(root):
    """What is published, byte for byte."""
    return (root / NOTEBOOK).read_bytes(), (root / RECORD).read_bytes()


def text(root):
    return miniproject.page(root, "alpha")


def test_what_is_published(published):
    notebook = nbformat.read(published / NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    record = json.loads((published / RECORD).read_text())
    code = pages.code(notebook)
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4, 5]
    assert not any(
        "injected" in str(cell.metadata) or "papermill" in str(cell.metadata) for cell in notebook.cells
    )
    assert code[0].metadata.tags == ["parameters"] and code[0].source == 'profile = "auto"'
    assert dict(notebook.metadata) == pages.METADATA and notebook.metadata.kernelspec.name == "python3"
    # stderr is gone, and the prints around it are one output
    assert [(out.name, out.text) for out in code[2].outputs] == [("stdout", "first\nsecond\n")]
    assert pages.embedded_record(notebook) == record
    assert list(record)[:5] == ["slug", "profile", "device", "settings", "claims"] and list(
        record["claims"]
    ) == ["sum", "gain"]
    assert record["notebook_s"] > record["wall_s"] > 0 and record["commit"] is None
    assert record["zoo"].keys() == {"tiny"} and "minilib.toy" in record["modules"]
    assert len(record["page_key"]) == len(record["library_key"]) == 64
    assert str(published) not in (published / NOTEBOOK).read_text(), "no path of this machine"
    assert not list((published / "results/cpu/logs").glob("*.failed*"))


def test_the_second_call_does_nothing(published):
    before, times = state(published), [(published / name).stat().st_mtime_ns for name in (NOTEBOOK, RECORD)]
    done = publish(published, "alpha", "--profile", "cpu")
    assert done.stdout == "alpha (cpu): up to date\n"
    assert state(published) == before
    assert times == [(published / name).stat().st_mtime_ns for name in (NOTEBOOK, RECORD)]
    assert "agree" in publish(published, "check").stdout


def test_prose_is_published_without_a_run(project):
    before = json.loads((project / NOTEBOOK).read_text())
    replace(text(project), "# # The alpha paper", "# # The alpha paper, again")
    replace(text(project), "# the experiment", "# the whole experiment")
    assert publish(project, "check", check=False).stderr.count("problem:") == 1
    done = publish(project, "alpha", "--profile", "cpu")
    assert done.stdout == "alpha (cpu): text updated, outputs kept\n"
    assert "agree" in publish(project, "check").stdout
    after = json.loads((project / NOTEBOOK).read_text())
    assert "".join(after["cells"][0]["source"]) == "# The alpha paper, again"
    assert [cell.get("outputs") for cell in after["cells"]] == [
        cell.get("outputs") for cell in before["cells"]
    ]


def test_sync_drops_the_outputs_of_changed_code(project):
    replace(text(project), 'print("second")', 'print("third")')
    assert publish(project, "sync").stdout == "alpha: written\n"
    assert publish(project, "sync", "alpha").stdout == "alpha: up to date\n"
    code = pages.code(nbformat.read(project / NOTEBOOK, as_version=4))
    assert [bool(cell.outputs) for cell in code] == [False, True, False, False, True]
    assert [cell.execution_count for cell in code] == [1, 2, None, 4, 5]
    problems = publish(project, "check", check=False)
    assert problems.returncode == 1
    assert "code cell 3 has no execution count; run the page again" in problems.stderr
    assert "alpha/cpu.json: page_key does not match" in problems.stderr


def test_a_library_that_changed_is_a_note_and_a_reason_to_run(project):
    before = state(project)
    replace(project / "minilib/toy.py", "a + b", "b + a")
    checked = publish(project, "check")
    assert "note: alpha/cpu.json: the library has changed since" in checked.stdout
    assert "executed; wrote" in publish(project, "alpha", "--profile", "cpu").stdout
    assert state(project) != before
    assert "note:" not in publish(project, "check").stdout


def test_a_failing_run_changes_nothing(project):
    before = state(project)
    results = (project / "results/cpu/alpha.ipynb").read_bytes()
    replace(text(project), "toy.add(1, 1)", "toy.subtract(1, 1)")
    done = publish(project, "alpha", "--profile", "cpu", check=False)
    assert done.returncode == 1
    assert "error: alpha (cpu) failed:" in done.stderr
    assert "AttributeError: module 'minilib.toy' has no attribute 'subtract'" in done.stderr
    assert "\x1b[" not in done.stderr
    failed = project / "results/cpu/logs/alpha.failed.ipynb"
    assert done.stderr.rstrip().endswith(f"notebook: {failed}")
    assert "AttributeError" in failed.read_text() and "toy.subtract" in failed.read_text()
    assert state(project) == before and (project / "results/cpu/alpha.ipynb").read_bytes() == results


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("toy.add(1, 1)", "__import__('os')._exit(3)", "Kernel died"),
        ("toy.add(1, 1)", "3", "ClaimFailed: alpha: exact claims that do not hold (a bug): sum"),
        ("run.report()", "", "the notebook holds 0 records; run.report() must be called exactly once"),
        ("run.report()", "run.report(); run.report()", "the notebook holds 2 records"),
        ('"alpha", profile', '"alpha", "smoke"', "profile smoke"),
        (
            'run.record("sum", total)',
            'run.not_tried("sum", "no adder is installed")',
            "not published: sum: that run could not try it (no adder is installed); run the page where",
        ),
        (' tags=["parameters"]', "", "0 cells are tagged 'parameters'; exactly one must be"),
    ],
)
def test_what_is_not_published(project, old, new, message):
    before = state(project)
    replace(text(project), old, new)
    done = publish(project, "alpha", "--profile", "cpu", check=False)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert "Traceback (most recent call last):\n  File" not in done.stderr, "told, not thrown"
    assert state(project) == before


BROKEN_DISK = """
import sys
from minilib import execution, publish

write = execution.atomic_write

def failing(path, data):
    if path.name == sys.argv[1]:
        raise OSError(28, "No space left on device")
    write(path, data)

execution.atomic_write = failing
publish.publish("alpha", "cpu", force=True)
"""


def test_both_files_or_neither(project, tmp_path):
    script = tmp_path / "broken_disk.py"
    script.write_text(BROKEN_DISK)
    replace(text(project), "1.75 +", "1.85 +")
    # A run of the changed page is there; publishing it fails at the second of the two files.
    publish(project, "execute", "alpha", "--profile", "cpu", "--out", "results/cpu")
    replace(script, "force=True", "force=False")
    before = state(project)
    done = miniproject.run(project, sys.executable, str(script), "cpu.json", check=False)
    assert done.returncode == 1 and "No space left" in done.stderr
    assert state(project) == before, "the notebook, written first, is back as it was"
    leftovers = [path for folder in ("notebooks", "reproductions") for path in (project / folder).rglob(".*")]
    assert leftovers == []

    done = publish(project, "alpha", "--profile", "cpu")
    assert "alpha (cpu): taken from results/; wrote" in done.stdout, "the run is not repeated"
    assert json.loads((project / RECORD).read_text())["claims"]["gain"]["values"] == [1.85, 1.86, 1.87]
    assert "agree" in publish(project, "check").stdout


def test_write_all_removes_what_was_not_there(tmp_path, monkeypatch):
    first, second, third = (tmp_path / name for name in ("a", "b", "c"))
    second.write_text("old")
    write = execution.atomic_write
    monkeypatch.setattr(
        execution, "atomic_write", lambda path, data: write(path, data) if path != third else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        execution.write_all({first: "new", second: "new", third: "new"})
    assert not first.exists() and second.read_text() == "old" and not third.exists()
    execution.write_all({first: "new", second: "new"})
    assert first.read_text() == second.read_text() == "new"


def test_other_profiles_leave_the_notebook_alone(project):
    before = state(project)
    done = publish(project, "alpha", "--profile", "smoke")
    assert "alpha (smoke): executed; see results/smoke/alpha.json" in done.stdout
    assert publish(project, "alpha", "--profile", "smoke").stdout == "alpha (smoke): up to date\n"
    done = publish(project, "alpha", "--profile", "gpu")
    assert done.stdout.endswith("alpha (gpu): executed; wrote reproductions/alpha/gpu.json\n")
    assert publish(project, "alpha", "--profile", "gpu").stdout == "alpha (gpu): up to date\n"
    assert state(project) == before
    assert json.loads((project / "results/smoke/alpha.json").read_text())["settings"] == {"seeds": [0]}
    assert json.loads((project / "reproductions/alpha/gpu.json").read_text())["profile"] == "gpu"
    assert "agree" in publish(project, "check").stdout


def test_the_table(published):
    lines = publish(published, "table", "alpha", "--profile", "cpu").stdout.splitlines()
    assert any(
        "1.76 [1.743, 1.777], n = 3" in line and "2.3x" in line and "✓ confirmed" in line for line in lines
    )
    done = publish(published, "table", "alpha", "--profile", "gpu", check=False)
    assert done.returncode == 1 and "run: make page SLUG=alpha PROFILE=gpu" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["alpa", "--profile", "cpu"], "no such card. Did you mean 'alpha'?"),
        (["alpha", "--profile", "fast"], "invalid choice: 'fast' (choose from 'smoke', 'cpu', 'gpu')"),
    ],
)
def test_wrong_calls(published, args, message):
    done = publish(published, *args, check=False)
    assert done.returncode != 0 and message in done.stderr


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def set_values(record):
    record["claims"]["gain"]["values"] = [0.75, 0.76, 0.77]


def set_verdict(record):
    record["claims"]["gain"]["verdict"] = "weaker"


def drop_values(record):
    record["claims"]["gain"] |= {"values": [1.76], "mean": 1.76, "interval": None, "verdict": "inconclusive"}


def drop_claim(record):
    del record["claims"]["sum"]


def call_untried(record):
    record["claims"]["sum"] = {
        "values": [],
        "mean": None,
        "interval": None,
        "verdict": "not tried",
        "not_tried": "no adder",
    }


def break_exact(record):
    record["claims"]["sum"] = {"values": [3.0], "mean": 3.0, "interval": None, "verdict": "contradicted"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_values, "gain: `verdict` is confirmed, recomputed contradicted"),
        (set_verdict, "gain: `verdict` is weaker, recomputed confirmed"),
        (drop_values, "gain: 1 values, the card asks for 3"),
        (drop_claim, "its claims ['gain'] are not the card's"),
        (call_untried, "sum: that run could not try it (no adder)"),
        (break_exact, "sum: an exact claim does not hold"),
        (lambda record: record.update(wall_s=0), "no wall time, so it did not really run"),
        (lambda record: record.pop("machine"), "`machine` is missing"),
        (lambda record: record["settings"].update(seeds=[0]), "page_key does not match"),
        (lambda record: record.update(profile="gpu"), "it says slug 'alpha', profile 'gpu'"),
        (lambda record: record.update(date="2020-01-01"), "the record in it is not cpu.json"),
    ],
)
def test_the_check_sees_an_edited_record(project, monkeypatch, change, message):
    edit(project / RECORD, change)
    assert message in "\n".join(problems(project, monkeypatch))


def problems(root, monkeypatch):
    """The check, in this process and without the second it takes to start another."""
    monkeypatch.setenv("MINILIB_ROOT", str(root))
    return consistency.check()[0]


def clear_outputs(notebook):
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}


def add_error(notebook):
    error = {"output_type": "error", "ename": "ValueError", "evalue": "x", "traceback": []}
    notebook["cells"][3]["outputs"].append(error)


def change_source(notebook):
    notebook["cells"][4]["source"] = ["total = 2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (clear_outputs, "code cell 1 has no execution count"),
        (clear_outputs, "no cell has an output"),
        (clear_outputs, "holds 0 records"),
        (add_error, "code cell 3 ended in ValueError"),
        (
            change_source,
            "its cells differ from notebooks/00-foundations/alpha.py; run: python -m minilib.publish sync",
        ),
        (
            lambda notebook: notebook["metadata"]["kernelspec"].update(name="mine"),
            "its metadata is not what pages carry",
        ),
        (lambda notebook: notebook["cells"].pop(0), "its cells differ"),
    ],
)
def test_the_check_sees_an_edited_notebook(project, monkeypatch, change, message):
    edit(project / NOTEBOOK, change)
    assert message in "\n".join(problems(project, monkeypatch))


def test_the_check_sees_what_is_missing_or_too_much(project, monkeypatch):
    assert problems(project, monkeypatch) == []
    (project / "notebooks/00-foundations/stray.py").write_text("")
    (project / "reproductions/alpha/notes.txt").write_text("")
    (project / "reproductions/gone").mkdir()
    (project / "reproductions/gone/cpu.json").write_text("{}")
    replace(text(project), 'print("first")', '# NBVAL_SKIP\nprint("first")')
    found = "\n".join(problems(project, monkeypatch))
    for message in (
        "notebooks/00-foundations/stray.py: belongs to no card",
        "reproductions/alpha/notes.txt: not a card or a record",
        "reproductions/gone/cpu.json: not a card or a record of one",
        "NBVAL_SKIP would keep a cell from being checked",
    ):
        assert message in found
    (project / RECORD).unlink()
    assert f"{RECORD}: does not exist; run: make page SLUG=alpha" in "\n".join(problems(project, monkeypatch))
    text(project).unlink()
    assert "the card 'alpha' has no page there" in "\n".join(problems(project, monkeypatch))


TEXT = "# %% [markdown]\n# # T\n# twice\n\n# %% [markdown]\n# # T\n# twice\n\n# %%\nx = 1\n\n# %%\n\n# %%\n# %pip list\nx\n"


def test_a_notebook_follows_from_its_text_alone():
    first, second = pages.notebook_of(TEXT), pages.notebook_of(TEXT)
    assert first == second and pages.dump_notebook(first) == pages.dump_notebook(second)
    assert [cell.cell_type for cell in first.cells] == ["markdown", "markdown", "code", "code"]
    assert first.cells[0].source == "# T\ntwice" and first.cells[3].source == "%pip list\nx"
    ids = [cell.id for cell in first.cells]
    assert len(set(ids)) == 4 and ids[1] == f"{ids[0]}-2"
    edited = pages.notebook_of(TEXT.replace("x = 1", "x = 2"))
    assert [a.id == b.id for a, b in zip(first.cells, edited.cells, strict=True)] == [True, True, False, True]


def test_outputs_stay_with_their_code():
    def with_counts(source):
        notebook = pages.notebook_of(source)
        for count, cell in enumerate(pages.code(notebook), 1):
            cell.execution_count = count
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=cell.source)]
        return notebook

    old = with_counts("# %%\na\n\n# %%\nb\n\n# %%\nc\n")
    new = pages.with_outputs(pages.notebook_of("# %%\na  # why\n\n# %%\nnew\n\n# %%\nc\n"), old)
    assert [[out.text for out in cell.outputs] for cell in pages.code(new)] == [["a"], [], ["c"]]
    assert [cell.execution_count for cell in pages.code(new)] == [1, None, 3]
    assert old.cells[0].source == "a", "the old notebook is left alone"


def test_never_ran():
    notebook = pages.notebook_of("# %%\nx = 1\n")
    assert pages.never_ran(notebook) == ["code cell 1 has no execution count", "no cell has an output"]
    notebook.cells[0].execution_count = 1
    notebook.cells[0].outputs = [nbformat.v4.new_output("display_data", data={MIME: {"a": [1]}})]
    assert pages.never_ran(notebook) == []
    assert pages.embedded_record(notebook) == {"a": [1]}


def test_a_page_runs_on_one_thread_also_where_the_fleet_gives_its_job_two(monkeypatch, tmp_path):
    from minilib.execution import kernel_environment

    for name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    env = {**os.environ, **kernel_environment("cpu", tmp_path)}
    code = "import minilib, torch; print(torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def failing(error, failures, calls):
    def execute(*args, **kwargs):
        calls.append((args, kwargs))
        if len(calls) <= failures:
            raise error
        return "done"

    return execute


def test_a_kernel_that_did_not_come_up_is_started_a_second_time():
    died, calls = RuntimeError("Kernel died before replying to kernel_info"), []
    assert execution._with_a_second_start(failing(died, 1, calls), "in", cwd="here") == "done"
    assert calls == [(("in",), {"cwd": "here"})] * 2

    with pytest.raises(RuntimeError, match="before replying"):
        execution._with_a_second_start(failing(died, 2, []))


@pytest.mark.parametrize(
    "error", [RuntimeError("a cell raised"), execution.PageFailed("died before replying")]
)
def test_any_other_failure_is_not_tried_again(error):
    calls = []
    with pytest.raises(type(error)):
        execution._with_a_second_start(failing(error, 1, calls))
    assert len(calls) == 1
