"""Masked weights and replaced modules."""

import copy
import re

import pytest
import torch
from snapshots import bits, structure
from torch import nn
from toys import randomise

from minilib.intervene import (
    mask_weights,
    record_outputs,
    replace_modules,
    transform_weights,
)


class TestWeights:
    def test_a_mask_of_ones_changes_no_bit_and_rows_are_pruned(self, model, inputs):
        before = model(*inputs)
        name = "blocks.1.mlp.fc1.weight"
        with mask_weights(model, {name: torch.ones(64, 16), "blocks.0.attn.qkv.bias": torch.ones(1)}):
            assert torch.equal(model(*inputs), before)
        rows, x = (torch.arange(64) % 2).float()[:, None], torch.randn(3, 16)
        fc1 = model.blocks[1].mlp.fc1
        with mask_weights(model, {name: rows}):
            inside = fc1(x)
            assert (
                torch.equal(model.state_dict()[name], fc1.weight)
                and (model(*inputs) - before).abs().max() > 1e-4
            )
        assert torch.equal(inside[:, ::2], fc1.bias[::2].expand(3, 32))
        torch.testing.assert_close(inside[:, 1::2], fc1(x)[:, 1::2], atol=1e-6, rtol=0)

    def test_equals_a_model_whose_weights_were_multiplied(self, model, inputs):
        names = [n for n, p in model.named_parameters() if p.ndim == 2]
        g = torch.Generator().manual_seed(3)
        masks = {n: torch.rand(model.get_parameter(n).shape, generator=g) for n in names}
        pruned = copy.deepcopy(model)
        with torch.no_grad():
            for name, mask in masks.items():
                pruned.get_parameter(name).mul_(mask)
        with mask_weights(model, masks):
            out = model(*inputs)
        assert torch.equal(out, pruned(*inputs))

    def test_gradients_of_masks_and_weights(self, stack):
        stack, x = stack.double(), torch.randn(2, 4, dtype=torch.float64)
        name = "1.linear.weight"

        def loss(mask):
            with mask_weights(stack, {name: mask}):
                return stack(x).square().sum()

        assert torch.autograd.gradcheck(loss, torch.rand(4, 1, dtype=torch.float64, requires_grad=True))
        mask = torch.rand(4, 4, dtype=torch.float64)
        (grad,) = torch.autograd.grad(loss(mask), stack[1].linear.weight)
        direct = stack[1].linear.weight.detach().mul(mask).requires_grad_()
        h = stack[0](x).detach()
        out = stack[2](h + nn.functional.linear(h, direct, stack[1].linear.bias))
        torch.testing.assert_close(grad, torch.autograd.grad(out.square().sum(), direct)[0] * mask)

    def test_masks_are_learned_step_by_step(self, stack):
        mask = nn.Parameter(torch.ones(4, 4))
        optimizer = torch.optim.SGD([mask], lr=0.1)
        x, losses = torch.randn(8, 4), []
        with mask_weights(stack, {"2.linear.weight": mask}):
            for _ in range(5):
                loss = stack(x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            part = stack[2].linear(x)
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
        expected = nn.functional.linear(x, stack[2].linear.weight * mask, stack[2].linear.bias)
        assert torch.equal(part, expected)

    def test_a_weight_that_is_read_from_outside_its_layer(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(5, 3)

            def forward(self, tokens):
                return self.table(tokens) @ self.table.weight.T

        model = randomise(Tied())
        with mask_weights(model, {"table.weight": torch.zeros(3)}):
            assert torch.equal(model(torch.tensor([1, 2])), torch.zeros(2, 5))

    def test_contexts_compose_in_their_order(self, stack):
        x, name = torch.randn(2, 4), "0.linear.weight"
        weight, bias = stack[0].linear.weight, stack[0].linear.bias
        with (
            transform_weights(stack, {name: lambda w: w + 1}),
            transform_weights(stack, {name: lambda w: 2 * w}),
        ):
            for call in (stack, stack[0].linear):
                with record_outputs(stack, "0.linear") as out:
                    call(x)
                torch.testing.assert_close(
                    out["0.linear"][0], nn.functional.linear(x, 2 * (weight + 1), bias)
                )

    def test_restored_inside_the_block_already(self, stack):
        name, before = "0.linear.weight", (structure(stack[0].linear), bits(stack))
        with mask_weights(stack, {name: torch.zeros(1)}):
            with pytest.raises(RuntimeError):
                stack(torch.zeros(1, 5))
            assert "weight" not in vars(stack[0].linear)
        assert structure(stack[0].linear) == before[0]

    def test_bad_masks(self, model):
        with pytest.raises(ValueError, match=r"no parameter of DiT is called 'blocks.0.mlp.fc3.weight'.*fc"):
            with mask_weights(model, {"blocks.0.mlp.fc3.weight": torch.ones(1)}):
                pass
        with pytest.raises(ValueError, match=r"the mask \(3,\) does not broadcast to \(64, 16\)"):
            with mask_weights(model, {"blocks.0.mlp.fc1.weight": torch.ones(3)}):
                pass
        with pytest.raises(ValueError, match="keep the shape"):
            with transform_weights(model, {"blocks.0.mlp.fc1.weight": lambda w: w[:2]}):
                model.blocks[0].mlp(torch.zeros(1, 1, 16))

    def test_one_parameter_under_two_names(self):
        layer = nn.Linear(2, 2)
        model = nn.ModuleDict({"a": layer, "b": layer})
        with pytest.raises(ValueError, match="'b.weight' and 'a.weight' are one parameter"):
            with mask_weights(model, {"a.weight": torch.ones(1), "b.weight": torch.ones(1)}):
                pass


class TestReplaceModules:
    def test_in_place_and_back(self, model, inputs):
        before, new = model(*inputs), nn.Identity()
        with replace_modules(
            model, {"blocks.1.attn": new, "blocks.0.mlp": copy.deepcopy(model.blocks[0].mlp)}
        ):
            assert model.blocks[1].attn is new
            assert (model(*inputs) - before).abs().max() > 1e-4
        assert torch.equal(model(*inputs), before)

    def test_bad_names(self, model):
        for names, message in (
            ({"blocks.*": nn.Identity()}, "is a pattern"),
            ({"": nn.Identity()}, "no module of DiT is called ''"),
            (
                {"blocks.0": nn.Identity(), "blocks.0.attn": nn.Identity()},
                "'blocks.0.attn' lies inside 'blocks.0'",
            ),
        ):
            with pytest.raises(ValueError, match=re.escape(message)), replace_modules(model, names):
                pass
