"""A student takes over what fits of its teacher, and nothing else; only the chosen parameters train."""

import pytest
import torch
from torch import nn

from minilib.inheritance import inherit, train_only


def network(width=3, seed=0, **extra):
    torch.manual_seed(seed)
    return nn.ModuleDict({"a": nn.Linear(2, width), "norm": nn.BatchNorm1d(3), **extra})


def test_what_fits_is_copied_and_the_rest_stays():
    student, teacher = network(4, 0, own=nn.Linear(1, 1)), network(3, 1, other=nn.Linear(1, 1))
    teacher["norm"].running_mean.fill_(5.0)
    before = student["a"].weight.clone()
    done = inherit(student, teacher)
    assert torch.equal(student["a"].weight, before), "another shape is not taken over"
    assert torch.equal(student["norm"].running_mean, torch.full((3,), 5.0)), "buffers are"
    assert set(done.inherited) == {f"norm.{k}" for k in teacher["norm"].state_dict()}
    assert set(done.fresh) == {"a.weight", "a.bias", "own.weight", "own.bias"}
    assert set(done.left) == {"a.weight", "a.bias", "other.weight", "other.bias"}
    assert str(done) == "5 tensors inherited, 4 fresh, 4 left behind"


def test_excluded_names_stay_fresh_and_nothing_is_shared():
    student, teacher = network(seed=0), network(seed=1)
    student["a"].weight.requires_grad_(False)
    fresh = student["a"].bias.clone()
    done = inherit(student, teacher, exclude=r"bias$")
    assert torch.equal(student["a"].weight, teacher["a"].weight) and torch.equal(student["a"].bias, fresh)
    assert {"a.bias", "norm.bias"} <= set(done.fresh) and {"a.bias", "norm.bias"} <= set(done.left)
    assert not student["a"].weight.requires_grad
    teacher["a"].weight.data.zero_()
    assert student["a"].weight.any()


def test_nothing_to_inherit_is_an_error():
    with pytest.raises(ValueError, match=r"nothing of the teacher \(Linear, 2 tensors\)"):
        inherit(nn.Linear(3, 4), nn.Linear(2, 3))
    with pytest.raises(ValueError, match="excludes none"):
        inherit(nn.Linear(2, 3), nn.Linear(2, 3), exclude="attn")
    with pytest.raises(ValueError, match="or all of it is excluded"):
        inherit(nn.Linear(2, 3), nn.Linear(2, 3), exclude=".")
    with pytest.raises(ValueError, match="not a regular expression"):
        inherit(nn.Linear(2, 3), nn.Linear(2, 3), exclude="(")


def test_only_what_matches_trains():
    model = network()
    model["norm"].weight.requires_grad_(False)
    assert train_only(model, r"weight$") == ("a.weight", "norm.weight")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"a.weight", "norm.weight"}
    with pytest.raises(ValueError, match=r"matches 'attn'; the first names are \['a.weight'"):
        train_only(model, "attn")
    with pytest.raises(ValueError, match="not a regular expression"):
        train_only(model, "[")
