"""minilib: the shared library of a book that re-runs diffusion-transformer papers at reduced scale.

Two one-thread processes do more than one two-thread process at these sizes, and a two-thread process collapses as soon as
anything else runs. So importing minilib asks for one thread, unless ``OMP_NUM_THREADS`` says otherwise. It does not import torch:
the command-line tools that only read cards and records start in a tenth of a second.
"""

import os
import sys

__version__ = "0.1.0"

os.environ.setdefault("OMP_NUM_THREADS", "1")
if "torch" in sys.modules:  # it has read the variable already
    sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"] or 1))
