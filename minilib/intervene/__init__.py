"""One way to intervene: act on named parts of a model inside a ``with`` block, without copying or changing the model.

Everything here takes a model and names (exact, glob or regular expression: ``named_blocks``) and puts the
model back as it was however the block ends. Attention has its own hook, the processor: see
``minilib.attention.intervene``.

- see: ``record_outputs``, ``record_inputs``, ``trace_executions``
- change activations: ``replace_output``, ``replace_input``, ``scale_outputs``, ``scale_inputs``, ``patch``
- leave out: ``skip``, ``gate``, ``cached``
- change weights: ``mask_weights``, ``transform_weights``, ``replace_modules``
"""

from .bypass import Executions, first_tensors, gate, skip, trace_executions
from .cache import FeatureCache, at_steps, cached, every
from .hooks import (
    record_inputs,
    record_outputs,
    replace_input,
    replace_output,
    scale_inputs,
    scale_outputs,
)
from .names import named_blocks
from .patching import patch
from .weights import mask_weights, replace_modules, transform_weights

__all__ = [
    "Executions",
    "FeatureCache",
    "at_steps",
    "cached",
    "every",
    "first_tensors",
    "gate",
    "mask_weights",
    "named_blocks",
    "patch",
    "record_inputs",
    "record_outputs",
    "replace_input",
    "replace_modules",
    "replace_output",
    "scale_inputs",
    "scale_outputs",
    "skip",
    "trace_executions",
    "transform_weights",
]
