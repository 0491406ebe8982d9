"""The Triton kernels without a GPU: interpreted (their values), compiled ahead of time (their build). A process each.

The interpreter is switched on when a kernel is imported, so the two cannot share a process. Their files are called
``check_*.py``, which an ordinary run does not collect.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NO_TRITON = importlib.util.find_spec("triton") is None


@pytest.mark.skipif(NO_TRITON, reason="triton is not installed (pip install 'minilib[kernels]')")
@pytest.mark.parametrize("folder, interpret", [("interp", "1"), ("aot", "0")])
def test_kernels_without_a_gpu(folder, interpret):
    environment = os.environ | {
        "TRITON_INTERPRET": interpret,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    environment.pop("MINILIB_KERNELS", None)
    command = [sys.executable, "-m", "pytest", str(HERE / folder), "-q", "-p", "no:cacheprovider", "-p"]
    command += ["no:randomly", "-o", "addopts=", "-o", "python_files=check_*.py", "--durations=5"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    print(done.stdout, done.stderr)
    files = len(list((HERE / folder).glob("check_*.py")))
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(passed[1]) >= files > 0 and "skipped" not in done.stdout
