"""Everything is restored, after errors and in any order of leaving."""

import pytest
import torch
from snapshots import assert_untouched, bits, structure
from torch import nn

from minilib.attention import record_attention
from minilib.intervene import (
    cached,
    every,
    gate,
    mask_weights,
    patch,
    record_inputs,
    record_outputs,
    replace_input,
    replace_modules,
    replace_output,
    scale_outputs,
    skip,
    trace_executions,
)


def interventions(model):
    with record_outputs(model, "blocks.*") as own:
        model(torch.zeros(2, 1, 4, 4), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    return {
        "record_outputs": lambda: record_outputs(model, "**"),
        "record_inputs": lambda: record_inputs(model, "blocks.*"),
        "replace_output": lambda: replace_output(model, {"blocks.1": lambda module, args, out: out}),
        "replace_input": lambda: replace_input(model, {"blocks.1": lambda module, x: x}),
        "scale": lambda: scale_outputs(model, {"blocks.1": 0.5}),
        "patch": lambda: patch(model, {name: calls[0] for name, calls in own.items()}),
        "skip": lambda: skip(model, "blocks.1"),
        "gate": lambda: gate(model, {"blocks.1": 0.5}),
        "cached": lambda: cached(model, "blocks.1", every(2)),
        "trace": lambda: trace_executions(model),
        "mask": lambda: mask_weights(model, {"blocks.1.mlp.fc1.weight": torch.zeros(1)}),
        "replace_modules": lambda: replace_modules(model, {"blocks.1.mlp": nn.Identity()}),
        "record_attention": lambda: record_attention(model),
    }


def test_everything_is_restored_after_the_block_and_after_an_error(model, inputs):
    before, out = (structure(model), bits(model)), model(*inputs)
    for name, enter in interventions(model).items():
        with enter():
            model(*inputs)
            if name != "mask":
                assert structure(model) != before[0], name
        assert_untouched(model, before)
        with pytest.raises(KeyError, match="inside"), enter():
            model(*inputs)
            raise KeyError("inside")
        assert_untouched(model, before)
        with pytest.raises(ValueError), enter():
            model(inputs[0][:, :, :3], *inputs[1:])
        assert_untouched(model, before)
    assert torch.equal(model(*inputs), out)


def test_all_at_once_in_any_order_of_leaving(model, inputs):
    before = structure(model), bits(model)
    out = model(*inputs)
    enters = {
        k: v for k, v in interventions(model).items() if k not in ("replace_modules", "record_attention")
    }
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        contexts = [enter() for enter in enters.values()]
        for context in contexts:
            context.__enter__()
        model(*inputs)
        for i in torch.randperm(len(contexts), generator=generator).tolist():
            contexts[i].__exit__(None, None, None)
            model(*inputs)
        assert_untouched(model, before)
    assert torch.equal(model(*inputs), out)


def test_leaving_takes_away_its_own_layer_and_no_other(stack):
    x = torch.randn(2, 4)
    expected, half = stack[1](x), 0.5 * (x + stack[1](x))
    skipped, gated = skip(stack, "1"), gate(stack, {"1": 0.5})
    skipped.__enter__()
    gated.__enter__()
    assert torch.equal(stack[1](x), x)
    skipped.__exit__(None, None, None)
    torch.testing.assert_close(stack[1](x), half)
    gated.__exit__(None, None, None)
    assert torch.equal(stack[1](x), expected)


def test_a_forward_that_was_replaced_by_hand_survives(stack):
    mine = lambda x: 3 * x  # noqa: E731
    stack[1].forward = mine
    with skip(stack, "1", check=False), trace_executions(stack, "1"):
        assert torch.equal(stack[1](torch.ones(1, 4)), torch.ones(1, 4))
    assert stack[1].forward is mine
    with trace_executions(stack, "1") as trace:
        assert torch.equal(stack[1](torch.ones(1, 4)), torch.full((1, 4), 3.0))
    assert trace.counts["1"].calls == 1


def test_a_setup_that_fails_half_way_leaves_nothing(model):
    before = structure(model), bits(model)
    for act in (
        lambda: replace_output(model, {"blocks.0": lambda m, a, o: o, "nothing": lambda m, a, o: o}),
        lambda: mask_weights(model, {"blocks.0.mlp.fc1.weight": torch.ones(1), "nothing": torch.ones(1)}),
        lambda: replace_modules(model, {"blocks.0.mlp": nn.Identity(), "nothing": nn.Identity()}),
    ):
        with pytest.raises(ValueError, match="nothing"), act():
            pass
        assert_untouched(model, before)
