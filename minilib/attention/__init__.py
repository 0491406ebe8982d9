"""Attention: every variant behind one signature, one layer that uses them, and ways to act on it from outside."""

from .functional import (
    ATTENTION,
    Attend,
    attention_weights,
    full_attention,
    get_attention,
    naive_attention,
    register_attention,
)
from .intervene import attention_modules, attention_processor, record_attention
from .module import Attention

__all__ = [
    "ATTENTION",
    "Attend",
    "Attention",
    "attention_modules",
    "attention_processor",
    "attention_weights",
    "full_attention",
    "get_attention",
    "naive_attention",
    "record_attention",
    "register_attention",
]
