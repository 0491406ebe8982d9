import subprocess
import sys

import pytest

from minilib.kernels.compiling import compile_kernel


def test_importing_it_does_not_import_triton():
    code = "import sys, minilib.kernels.compiling; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_triton_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)

    def kernel():
        pass

    kernel.arg_names = []
    with pytest.raises(ImportError, match=r'pip install "minilib\[kernels\]"'):
        compile_kernel(kernel, 80, {}, {})
