"""Names and patterns of modules, and what they select."""

import re
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from minilib.intervene import (
    cached,
    every,
    gate,
    named_blocks,
    patch,
    record_inputs,
    record_outputs,
    replace_input,
    replace_modules,
    replace_output,
    scale_inputs,
    scale_outputs,
    skip,
    trace_executions,
)


class TestNames:
    @pytest.mark.parametrize(
        "pattern, expected",
        [
            ("blocks.1.attn", ["blocks.1.attn"]),
            ("blocks.*", ["blocks.0", "blocks.1", "blocks.2"]),
            ("blocks.[02].mlp", ["blocks.0.mlp", "blocks.2.mlp"]),
            ("**.attn", ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]),
            ("**.fc?", ["t_embedder.fc1", "t_embedder.fc2"] + [f"blocks.{i}.mlp.fc{j}" for i in range(3) for j in (1, 2)]),
            (re.compile(r"blocks\.\d+\.mlp"), ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]),
            (["blocks.2", "x_embedder", "blocks.*"], ["x_embedder", "blocks.0", "blocks.1", "blocks.2"]),
            ("", [""]),
        ],
    )  # fmt: skip
    def test_in_the_order_of_the_model(self, model, pattern, expected):
        found = named_blocks(model, pattern)
        assert list(found) == expected
        assert all(found[name] is model.get_submodule(name) for name in expected)

    def test_everything(self, model):
        assert list(named_blocks(model, "**")) == [name for name, _ in model.named_modules() if name]

    @pytest.mark.parametrize("act", [named_blocks, record_outputs, record_inputs, skip, trace_executions])
    def test_a_name_that_matches_nothing_is_refused_with_near_names(self, model, act):
        with pytest.raises(ValueError, match="no module of DiT is called 'block.1.attn'.*'blocks.1.attn'"):
            with ExitStack() as stack:
                for_all = act(model, ["blocks.0", "block.1.attn"])
                stack.enter_context(for_all)

    @pytest.mark.parametrize(
        "act",
        [
            lambda m, n: cached(m, n, every(2)),
            lambda m, n: replace_output(m, {n: lambda module, args, out: out}),
            lambda m, n: replace_input(m, {n: lambda module, x: x}),
            lambda m, n: scale_outputs(m, {n: 1.0}),
            lambda m, n: scale_inputs(m, {n: 1.0}),
            lambda m, n: gate(m, {n: 1.0}),
            lambda m, n: patch(m, {n: torch.zeros(1)}),
            lambda m, n: replace_modules(m, {n: nn.Identity()}),
        ],
    )
    def test_every_intervention_refuses_unknown_names(self, model, act):
        with pytest.raises(ValueError, match=r"no module of DiT is called 'blocks.3'.*'blocks.0'"):
            with act(model, "blocks.3"):
                pass

    def test_a_container_is_never_called_and_is_refused(self, model):
        with pytest.raises(ValueError, match="'blocks' is a container, a ModuleList.*'blocks.0'"):
            with record_outputs(model, "blocks"):
                pass
        with record_outputs(model, "*") as records:
            pass
        assert list(records) == ["x_embedder", "t_embedder", "y_embedder", "final_layer"]

    def test_a_shared_module_is_taken_once(self):
        layer = nn.Linear(2, 2)
        model = nn.ModuleDict({"a": layer, "b": layer})
        assert list(named_blocks(model, "*")) == ["a"] and list(named_blocks(model, "b")) == ["b"]

    def test_no_name_at_all(self, model):
        with pytest.raises(ValueError, match="at least one"):
            named_blocks(model, [])
