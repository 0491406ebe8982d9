"""Depth pruning: the masks, their sampling and its gradient, gates against really dropped blocks, scores."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilib.adapters import add_lora
from minilib.models import DIT_CONFIGS, DiT, MMDiT
from minilib.profiling import count_parameters, to_meta
from minilib.pruning import (
    NMGates,
    block_influence,
    depth_candidates,
    drop_blocks,
    gated_blocks,
    gumbel_noise,
    gumbel_temperature,
    keep_highest,
    mask_patterns,
    one_hot_mask,
)

GROUPS = [[(2, 4), (2, 4)], [(1, 2)] * 4, [(3, 4), (1, 3), (1, 1)]]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_dit(depth=4, seed=0):
    torch.manual_seed(seed)
    model = DiT(input_size=4, hidden_size=16, depth=depth, num_heads=2, num_classes=3).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def inputs(n=5, seed=1):
    g = seeded(seed)
    return (
        torch.randn(n, 1, 4, 4, generator=g),
        torch.randint(1000, (n,), generator=g),
        torch.randint(4, (n,), generator=g),
    )


@pytest.mark.parametrize(("keep", "of"), [(1, 1), (1, 2), (2, 4), (3, 5), (4, 4)])
def test_patterns_are_all_masks_once(keep, of):
    masks = mask_patterns(keep, of)
    wanted = {bits for bits in itertools.product((0.0, 1.0), repeat=of) if sum(bits) == keep}
    assert {tuple(row) for row in masks.tolist()} == wanted and len(masks) == len(wanted)


@pytest.mark.parametrize("groups", GROUPS)
def test_candidates_are_the_product_of_the_groups(groups):
    found = depth_candidates(groups)
    depth = sum(m for _, m in groups)
    wanted = []
    for kept in itertools.combinations(range(depth), sum(n for n, _ in groups)):
        start, fits = 0, True
        for n, m in groups:
            fits &= sum(start <= k < start + m for k in kept) == n
            start += m
        if fits:
            wanted.append(kept)
    assert sorted(found) == sorted(wanted) and len(set(found)) == len(found) == NMGates(groups).num_candidates


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("temperature", [4.0, 0.1])
def test_a_sample_keeps_exactly_n_of_each_group(groups, temperature):
    gates = NMGates(groups)
    noise = gumbel_noise((2000, gates.num_patterns), seeded())
    masks = gates.sample(noise, temperature)
    assert masks.shape == (2000, gates.depth)
    assert set(masks.unique().tolist()) <= {0.0, 1.0}, "exactly, not nearly"
    start = 0
    for n, m in groups:
        assert (masks[:, start : start + m].sum(1) == n).all()
        start += m


def test_masks_are_drawn_as_often_as_their_probability_says_one_an_example():
    gates = NMGates([(1, 2), (2, 4)], scale=10.0)
    with torch.no_grad():
        gates.logits[0].copy_(torch.tensor([0.1, 0.0]))
        gates.logits[1].copy_(torch.tensor([0.0, 0.1, 0.2, -0.1, 0.05, 0.0]))
    n = 40_000
    masks = gates.sample(gumbel_noise((n, 8), seeded(3)), 0.7).detach()
    assert len(masks[:50].unique(dim=0)) > 5, "each example has a mask of its own"
    drawn = masks[:, 2:] @ mask_patterns(2, 4).T == 2
    expected = torch.softmax(10 * gates.logits[1], 0)
    assert torch.allclose(drawn.float().mean(0), expected.detach(), atol=4 * 0.5 / math.sqrt(n))
    assert torch.allclose(masks.mean(0), gates.block_probabilities().detach(), atol=4 * 0.5 / math.sqrt(n))
    assert gates.block_probabilities().sum().item() == pytest.approx(gates.num_kept, abs=1e-5)
    assert gates.probabilities()[0][0].item() == pytest.approx(1 / (1 + math.exp(-1.0)), abs=1e-6)


def test_a_sample_is_that_of_torch_s_gumbel_softmax(monkeypatch):
    """The same noise through torch's own function gives the same values and the same gradients."""
    gates, temperature = NMGates([(2, 4)], scale=3.0), 0.8
    with torch.no_grad():
        gates.logits[0].copy_(torch.randn(6, generator=seeded(1)))
    noise = gumbel_noise((7, 6), seeded(2))
    weight = torch.randn(7, 4, generator=seeded(4))

    theirs = gates.logits[0].detach().clone().requires_grad_(True)

    def given(self, *args, **kwargs):
        return self.copy_(torch.exp(-noise))  # torch takes -log of an exponential value

    monkeypatch.setattr(torch.Tensor, "exponential_", given)
    one_hot = F.gumbel_softmax((3.0 * theirs).expand(7, 6), tau=temperature, hard=True)
    monkeypatch.undo()
    (one_hot @ mask_patterns(2, 4) * weight).sum().backward()
    ours = gates.sample(noise, temperature)
    (ours * weight).sum().backward()
    assert torch.allclose(ours, one_hot @ mask_patterns(2, 4), atol=1e-6)
    assert torch.allclose(gates.logits[0].grad, theirs.grad, atol=1e-6) and theirs.grad.abs().min() > 1e-4


def test_soft_samples_and_low_temperatures():
    gates = NMGates([(2, 4)])
    noise = gumbel_noise((50, 6), seeded())
    soft = gates.sample(noise, 1.0, hard=False)
    assert torch.allclose(soft.sum(1), torch.full((50,), 2.0), atol=1e-5) and 0 < soft.min().item() < 0.5
    cold = gates.sample(noise, 1e-3, hard=False)
    assert torch.allclose(cold, gates.sample(noise, 5.0), atol=1e-3), (
        "the draw does not depend on the temperature"
    )


def test_gumbel_noise_has_its_distribution():
    values = gumbel_noise((200_000,), seeded())
    assert float(values.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(values.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)
    assert torch.equal(gumbel_noise((3, 2), seeded(5)), gumbel_noise((3, 2), seeded(5)))


def test_the_gradient_reaches_every_logit_and_points_down():
    """A block whose loss is high loses probability: a toy in which the best mask is known."""
    cost = torch.tensor([3.0, 0.0, 1.0, 2.0, 0.0, 5.0])
    gates = NMGates([(2, 4), (1, 2)])
    noise = gumbel_noise((256, gates.num_patterns), seeded())
    (gates.sample(noise, 4.0) @ cost).mean().backward()
    assert all((p.grad != 0).all() for p in gates.logits)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(40):
        noise = gumbel_noise((64, gates.num_patterns), seeded(step))
        loss = (gates.sample(noise, gumbel_temperature(step, 40)) @ cost).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gates.kept() == (1, 2, 4) and min(gates.confidence()) > 0.9


def test_the_temperature_falls_linearly():
    path = [gumbel_temperature(k, 5) for k in range(5)]
    assert path[0] == 4.0 and path[-1] == pytest.approx(0.1)
    steps = [a - b for a, b in itertools.pairwise(path)]
    assert steps == pytest.approx([steps[0]] * 4)
    assert gumbel_temperature(0, 1) == 4.0 and gumbel_temperature(1, 3, 2.0, 1.0) == 1.5


def test_the_decision_is_the_most_probable_mask():
    gates = NMGates([(2, 4), (1, 2)])
    assert gates.kept() == (0, 1, 4), "equal logits: the first mask of each group"
    with torch.no_grad():
        gates.logits[0][4] = 0.05  # the masks of 2:4 are 01 02 03 12 13 23
        gates.logits[1][1] = 0.03
    assert gates.kept() == (1, 3, 5)
    assert gates.confidence()[1] == pytest.approx(math.exp(3) / (math.exp(3) + math.exp(2)), rel=1e-4)


@pytest.mark.parametrize("kept", depth_candidates([(1, 2), (1, 2)]) + [(0,), (3,), (0, 1, 2, 3)])
def test_a_gated_model_is_the_pruned_one(kept):
    model, x = random_dit(), inputs()
    with torch.no_grad():
        whole, pruned = model(*x), drop_blocks(model, kept)(*x)
        with gated_blocks(model, one_hot_mask(kept, 4)):
            gated = model(*x)
    assert (gated - pruned).abs().max() <= 1e-6
    assert torch.equal(gated, whole) == (len(kept) == 4), "a mask of ones changes no bit"
    assert torch.equal(model(*x), whole), "the model is as it was"


def test_each_example_has_its_own_mask():
    model, x = random_dit(), inputs(n=4)  # as many examples as blocks: rows and columns must not be confused
    kept = depth_candidates([(1, 2), (1, 2)])
    masks = torch.cat([one_hot_mask(k, 4) for k in kept])
    with torch.no_grad(), gated_blocks(model, masks):
        together = model(*x)
    for i, k in enumerate(kept):
        with torch.no_grad():
            alone = drop_blocks(model, k)(*(v[i : i + 1] for v in x))
        assert torch.allclose(together[i : i + 1], alone, atol=1e-5), k


def test_fractions_blend_and_masks_get_gradients():
    model, x = random_dit(depth=2), inputs(n=3)
    masks = torch.tensor([[0.25, 1.0]], requires_grad=True)
    with gated_blocks(model, masks):
        out = model(*x)
    c = F.silu(model.embed_condition(x[1], x[2]))
    h = model.x_embedder(x[0]) + model.pos_embed
    h = 0.25 * model.blocks[0](h, c) + 0.75 * h
    wanted = model.unpatchify(model.final_layer(model.blocks[1](h, c), c))
    assert torch.allclose(out, wanted, atol=1e-5)
    out.square().mean().backward()
    assert masks.grad.shape == (1, 2) and (masks.grad != 0).all()


def test_gates_and_low_rank_updates_learn_together():
    model = random_dit()
    lora = add_lora(model, "blocks.*.**", rank=2, alpha=4, generator=seeded())
    gates = NMGates([(2, 4)])
    with gated_blocks(model, gates.sample(gumbel_noise((5, 6), seeded()), 4.0)):
        model(*inputs()).square().mean().backward()
    assert all((p.grad != 0).any() for p in gates.parameters())
    assert any((p.grad != 0).any() for p in lora.parameters())
    assert all(p.grad is None for n, p in model.named_parameters() if "adapters" not in n)


def test_a_dropped_model_is_rebuilt_by_its_config_and_costs_its_share():
    model = random_dit()
    pruned = drop_blocks(model, (1, 2))
    again = DiT(**pruned.config).eval()
    again.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        assert torch.equal(again(*inputs()), pruned(*inputs()))
    assert model.config["depth"] == 4 == len(model.blocks)
    for a, b in zip((model.blocks[1], model.blocks[2]), pruned.blocks, strict=True):
        assert all(
            torch.equal(p, q) and p is not q for p, q in zip(a.parameters(), b.parameters(), strict=True)
        )
    assert 2 * count_parameters(pruned.blocks) == count_parameters(model.blocks)
    with torch.device("meta"):
        big = DiT(**DIT_CONFIGS["DiT-XL/2"])
    half = drop_blocks(to_meta(big), range(0, 28, 2))
    assert 2 * count_parameters(half.blocks) == count_parameters(big.blocks)


def test_lists_of_another_name_and_models_without_a_config():
    model = nn.Module()
    model.stack = nn.Module()
    model.stack.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert len(drop_blocks(model, (2,), "stack.layers").stack.layers) == 1
    with pytest.raises(ValueError, match=r"no list of blocks 'blocks'; its lists are \['stack.layers'\]"):
        drop_blocks(model, (0,))


def test_blocks_of_several_kinds_are_refused():
    model = MMDiT(sample_size=4, in_channels=1, hidden_size=16, depth=3, num_heads=2, context_dim=8)
    kept = drop_blocks(model, (0, 2))
    assert kept.config["depth"] == 2
    with pytest.raises(ValueError, match="not all of one kind"):
        drop_blocks(model, (0, 1))


class Turn(nn.Module):
    """A block that turns tokens of two features by an angle, and stretches them."""

    def __init__(self, angle, stretch=1.0):
        super().__init__()
        self.angle, self.stretch = angle, stretch

    def forward(self, x):
        c, s = math.cos(self.angle), math.sin(self.angle)
        return self.stretch * x @ torch.tensor([[c, s], [-s, c]])


def test_influence_is_one_minus_the_cosine():
    angles = (0.0, 0.5, 1.0, math.pi)
    model = nn.Module()
    model.blocks = nn.ModuleList([Turn(a, stretch=1 + a) for a in angles])

    def call(m):
        for n in (3, 5):
            x = torch.randn(n, 4, 2, generator=seeded(n))
            for block in m.blocks:
                x = block(x)

    scores = block_influence(model, call)
    assert scores.tolist() == pytest.approx([1 - math.cos(a) for a in angles], abs=1e-5)
    assert keep_highest(scores, 2) == (2, 3)
    with pytest.raises(ValueError, match="ran no block"):
        block_influence(model, lambda m: None)


def test_influence_of_a_model_is_what_its_tokens_say():
    model, x = random_dit(), inputs()
    scores = block_influence(model, lambda m: m(*x))
    c, h = F.silu(model.embed_condition(x[1], x[2])), model.x_embedder(x[0]) + model.pos_embed
    for i, block in enumerate(model.blocks):
        after = block(h, c)
        cosine = (h * after).sum(-1) / (h.norm(dim=-1) * after.norm(dim=-1))
        assert scores[i].item() == pytest.approx(1 - cosine.mean().item(), abs=1e-5)
        h = after


def test_the_highest_scores_are_kept():
    scores = torch.tensor([0.1, 0.9, 0.8, 0.7, 0.2, 0.6, 0.3, 0.0])
    assert keep_highest(scores, 4) == (1, 2, 3, 5)
    assert keep_highest(scores, 4, groups=[(2, 4), (2, 4)]) == (1, 2, 5, 6)
    assert keep_highest(scores, 4, spare_last=True) == (1, 2, 3, 7)
    assert float(scores[-1]) == 0.0, "the scores given are not changed"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mask_patterns(0, 2), "got 0 of 2"),
        (lambda: mask_patterns(3, 2), "got 3 of 2"),
        (lambda: NMGates([]), "no group given"),
        (lambda: depth_candidates([(2, 1)]), "got 2 of 1"),
        (lambda: gumbel_temperature(5, 5), "step 5 of 5"),
        (lambda: gumbel_temperature(0, 5, end=0.0), "positive temperatures"),
        (lambda: NMGates([(1, 2)]).sample(torch.zeros(3, 4), 1.0), "noise of 4 values"),
        (lambda: NMGates([(1, 2)]).sample(torch.zeros(3, 2), 0.0), "temperature must be above 0"),
        (lambda: drop_blocks(random_dit(), ()), "at least one"),
        (lambda: drop_blocks(random_dit(), (1, 1)), "rising indices"),
        (lambda: drop_blocks(random_dit(), (2, 1)), "rising indices"),
        (lambda: drop_blocks(random_dit(), (0, 4)), "from 0 to 3"),
        (lambda: drop_blocks(random_dit(), (-1, 2)), "from 0 to 3"),
        (lambda: one_hot_mask((4,), 4), "from 0 to 3"),
        (lambda: keep_highest(torch.zeros(4), 3, groups=[(1, 2), (1, 2)]), "do not keep 3 of 4"),
        (lambda: keep_highest(torch.zeros(4), 2, groups=[(2, 3)]), "do not keep 2 of 4"),
        (lambda: keep_highest(torch.zeros(4), 2, groups=[(2, 4)], spare_last=True), "leave it out"),
        (lambda: gated_blocks(random_dit(), torch.ones(1, 3)).__enter__(), "masks for 3 blocks"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
