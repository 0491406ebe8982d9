"""``S``: the same files as ``minilib.schedulers``, loaded a second time without run-time type checks.

The checks cost 30 times a step. Where thousands of trajectories are compared, numbers are the question and not types: those are
checked in the other tests.
"""

import importlib.util
import sys
from pathlib import Path

import minilib.schedulers

NAME = "schedulers_without_type_checks"
SOURCE = Path(minilib.schedulers.__file__).parent

if NAME not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        NAME, SOURCE / "__init__.py", submodule_search_locations=[str(SOURCE)]
    )
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])

S = sys.modules[NAME]
