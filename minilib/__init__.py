"""minilib: the shared library of a book that re-runs diffusion-transformer papers at reduced scale.

Two one-thread processes do more than one two-thread process at these sizes, and a two-thread process collapses as soon as
anything else runs. So importing minilib pins torch to one thread, unless ``OMP_NUM_THREADS`` says otherwise.
"""

import os

import torch

__version__ = "0.1.0"

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 1))
