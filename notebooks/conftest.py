"""Pages are executed by nbval, cell by cell. This fails the run if one of them was not really executed.

For each notebook that was collected: every code cell ran and passed (a skipped one counts as not run), and the page left a
receipt from its report: this profile, begun after this session began, with a wall time. Receipts go to MINILIB_RECEIPTS;
``python -m minilib.publish receipts`` then also asks for the pages that were not collected at all.
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from nbval import kernel, plugin

KERNEL_STARTS = 3


def pytest_configure(config):
    plugin.RunningKernel = PatientKernel
    if hasattr(config, "workerinput"):
        return  # a worker of xdist inherits the environment; its results are judged in the main process
    os.environ.setdefault("MINILIB_PROFILE", "smoke")
    os.environ.setdefault("MINILIB_JOBS", "1")
    os.environ.setdefault("MINILIB_RECEIPTS", str(config.rootpath / "results" / "smoke" / "receipts"))
    # A backend set outside, such as Agg, would keep figures out of the pages.
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    config.pluginmanager.register(ReallyRan(time.time()), "minilib-really-ran")


class PatientKernel(kernel.RunningKernel):
    """A kernel that is started again if it did not come up.

    The ports of a kernel are chosen before it binds them, so of two that start at the same moment one may find its own
    taken and die. No cell has run by then: starting again, with other ports, loses nothing.
    """

    def __init__(self, *args, **kwargs):
        for start in range(1, KERNEL_STARTS + 1):
            try:
                super().__init__(*args, **kwargs)
                return
            except RuntimeError as error:
                print(f"kernel: start {start} of {KERNEL_STARTS} failed: {error}", file=sys.stderr)
                if start == KERNEL_STARTS:
                    raise


class ReallyRan:
    def __init__(self, started):
        self.started = started
        self.passed = Counter()
        self.problems = []

    def pytest_runtest_logreport(self, report):
        path, _, cell = report.nodeid.partition("::")
        if path.endswith(".ipynb") and cell:
            self.passed[path] += report.when == "call" and report.passed

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workerinput") or session.config.option.collectonly:
            return
        for name, passed in sorted(self.passed.items()):
            path = session.config.rootpath / name
            self.problems += [f"{name}: {problem}" for problem in self.check(path, passed)]
        if self.problems and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def check(self, path, passed):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        if passed != len(cells):
            yield f"{passed} of its {len(cells)} code cells were executed and passed"
        receipt = Path(os.environ["MINILIB_RECEIPTS"], f"{path.stem}.json")
        if not receipt.is_file():
            yield "it left no receipt, so it did not run to its report"
            return
        left = json.loads(receipt.read_text())
        if left["started"] < self.started:
            yield "its receipt is older than this session"
        if not left["wall_s"] or left["profile"] != os.environ["MINILIB_PROFILE"]:
            yield f"its receipt says profile {left['profile']}, {left['wall_s']} s"

    def pytest_terminal_summary(self, terminalreporter):
        if self.problems:
            terminalreporter.section("pages that did not really run", red=True)
            for line in self.problems:
                terminalreporter.line(line)
