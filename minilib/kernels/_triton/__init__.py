"""Triton kernels, imported when one is chosen. ``@no_type_check`` keeps the tests' type checker out of their source."""
