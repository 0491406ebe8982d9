"""Renaming and reshaping state dicts by a table, so that one table serves both directions and a round trip is exact."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

StateDict = Mapping[str, Tensor]


class ConversionError(ValueError):
    """A state dict or a model that cannot be converted without changing what it computes."""


@dataclass(frozen=True)
class Row:
    """One tensor here, and the tensor or tensors there that hold the same numbers.

    same: equal; patch: a convolution's weight; split: concatenated along the first axis; copies: each equal.
    """

    ours: str
    theirs: tuple[str, ...]
    kind: Literal["same", "patch", "split", "copies"] = "same"


def linear_rows(ours: str, *theirs: str, kind: str = "same") -> list[Row]:
    """The rows of a linear layer's weight and bias."""
    return [Row(f"{ours}.{p}", tuple(f"{name}.{p}" for name in theirs), kind) for p in ("weight", "bias")]


def to_theirs(state: StateDict, table: list[Row], *, patch_size: int = 1) -> dict[str, Tensor]:
    """minilib's state dict in the other side's names and shapes; every tensor is a copy."""
    result = {}
    for row in table:
        tensor = state[row.ours].detach()
        if row.kind == "patch":
            kernel = rearrange(tensor, "d (c p q) -> d c p q", p=patch_size, q=patch_size)
            result[row.theirs[0]] = kernel.clone()
        elif row.kind == "split":
            parts = tensor.chunk(len(row.theirs))
            result |= {name: part.clone() for name, part in zip(row.theirs, parts, strict=True)}
        else:
            result |= {name: tensor.clone() for name in row.theirs}
    return result


def to_ours(state: StateDict, table: list[Row]) -> dict[str, Tensor]:
    """The other side's state dict in minilib's names and shapes.

    Raises:
        ConversionError: tensors that should be copies of each other differ.
    """
    result = {}
    for row in table:
        tensors = [state[name].detach() for name in row.theirs]
        if row.kind == "patch":
            result[row.ours] = tensors[0].flatten(1)
        elif row.kind == "split":
            result[row.ours] = torch.cat(tensors)
        else:
            for name, tensor in zip(row.theirs, tensors, strict=True):
                if not torch.equal(tensor, tensors[0]):
                    raise ConversionError(
                        f"{name} differs from {row.theirs[0]}: minilib keeps one tensor in place of these "
                        f"{len(tensors)}, so they have to be equal"
                    )
            result[row.ours] = tensors[0]
    return result


def refuse_other_options(
    config: Mapping[str, Any], source: str, ours: str, fixed: Mapping[str, Any], known: Collection[str]
) -> None:
    """Go through a diffusers configuration and let only through what can be computed here.

    Args:
        config: option names and values; names that begin with an underscore are ignored.
        source: the class the configuration is of, for messages.
        ours: what it is to become, for messages.
        fixed: options that change what is computed, and the one value each may have.
        known: names of all other options.

    Raises:
        ConversionError: an unknown option, or another value than the fixed one; the message names it.
    """
    for name, value in config.items():
        if name.startswith("_") or name in known:
            continue
        if name not in fixed:
            raise ConversionError(f"unknown option {name!r} of {source}")
        if value != fixed[name]:
            raise ConversionError(
                f"{ours} computes with {name} = {fixed[name]!r}, the configuration has {value!r}"
            )


def check_state(state: StateDict, expected: StateDict, source: str) -> None:
    """Compare names and shapes with those ``expected`` (on the meta device, say).

    Raises:
        ConversionError: missing or unexpected names, or a shape that differs.
    """
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise ConversionError(
            f"this is no {source} state dict of the given configuration; missing: {some_names(missing)}; "
            f"unexpected: {some_names(unexpected)}"
        )
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise ConversionError(
                f"{name} has shape {tuple(state[name].shape)}, "
                f"this configuration expects {tuple(tensor.shape)}"
            )


def some_names(names: list[str]) -> str:
    """At most five names, for a message."""
    return (
        ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
    )
