import subprocess
import sys

import pytest

CODE = """
import os
os.environ.pop("OMP_NUM_THREADS", None)
{before}
import minilib
import torch
print(torch.get_num_threads())
"""


@pytest.mark.parametrize("before", ["", "import torch", "os.environ['OMP_NUM_THREADS'] = '2'"])
def test_importing_minilib_asks_for_one_thread_unless_told_otherwise(before):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(before=before)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ("2" if "'2'" in before else "1")


def test_importing_minilib_does_not_import_torch():
    code = "import sys, minilib; print('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "False"
    )
