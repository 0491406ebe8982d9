"""What is around ``mmdit_emoji``: its conditions, batches and drawings, and the judge of what is recognised."""

import pytest
import torch

from minilib.data import load
from minilib.data.text_states import caption_states
from minilib.guidance import classifier_free_guidance
from minilib.losses import flow_matching_loss
from minilib.models import MMDiT
from minilib.recipes.emoji import (
    conditions,
    draw_emoji,
    emoji_batches,
    identified,
    nearest_real,
    null_conditions,
    picked,
    recognised,
)


@pytest.fixture(scope="module")
def states():
    return caption_states("minilm", "train")


@pytest.fixture(scope="module")
def data():
    return load("emoji", "train", 32)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = MMDiT(
        sample_size=32, patch_size=8, hidden_size=16, depth=2, num_heads=2, context_dim=128, pooled_dim=3
    )
    for p in model.parameters():
        p.data.normal_(std=0.2)
    return model


def noon(n, generator):
    return 1000 * torch.rand(n, generator=generator)


def test_batches_pair_pictures_with_their_captions_and_styles(data, states):
    make = emoji_batches(data, states, noon)
    a, b = (make(torch.Generator().manual_seed(3), 400) for _ in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    flat = data.x.flatten(1)
    places = [(flat == x.flatten()).all(1).nonzero().squeeze(1) for x in a["x0"]]
    twins = torch.tensor([len(found) > 1 for found in places])  # a few concepts are drawn alike
    assert all(len(found) for found in places) and twins.float().mean() < 0.1
    place = torch.stack([found[0] for found in places])
    given = conditions(states, data.concept[place], data.style[place])
    dropped = (a["context"] == states.null).all(2).all(1)
    anonymous = (a["pooled"] == 0).all(1)
    assert 0.05 < dropped.float().mean() < 0.16 and 0.05 < anonymous.float().mean() < 0.16
    assert 0 < int((dropped & anonymous).sum()) < 20, "captions and styles are dropped independently"
    for key, sure in (("context", ~dropped), ("context_mask", ~dropped), ("pooled", ~anonymous)):
        assert torch.equal(a[key][sure & ~twins], given[key][sure & ~twins]), key
    assert torch.equal(a["context_mask"][dropped], states.null_mask.expand(int(dropped.sum()), -1))


def test_the_loss_hands_text_states_to_the_model(data, states, small):
    batch = emoji_batches(data, states, noon)(torch.Generator().manual_seed(0), 6)
    s = (batch["t"] / 1000).reshape(-1, 1, 1, 1)
    v = small(
        (1 - s) * batch["x0"] + s * batch["noise"],
        batch["t"],
        batch["context"],
        batch["context_mask"],
        batch["pooled"],
    )
    expected = (v - (batch["noise"] - batch["x0"])).square().mean()
    assert torch.allclose(flow_matching_loss(small, batch), expected)
    other = batch | {"pooled": torch.roll(batch["pooled"], 1, 1)}
    assert not torch.allclose(flow_matching_loss(small, other), expected)


def test_guidance_extrapolates_from_the_empty_caption(data, states, small):
    x, t = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.full((4,), 500.0)
    given = conditions(states, data.concept[:4], data.style[:4])
    null = {k: v.expand_as(given[k]) for k, v in null_conditions(states).items()}
    guided = classifier_free_guidance(small, cond=given, null=null_conditions(states), guidance_scale=3.0)
    with torch.no_grad():
        want = small(x, t, **null) + 3 * (small(x, t, **given) - small(x, t, **null))
        assert torch.allclose(guided(x, t), want, atol=1e-4)


def test_drawings_do_not_depend_on_the_batch_and_follow_caption_and_style(data, states, small):
    concept, style = data.concept[:5], data.style[:5]
    a, b = (draw_emoji(small, states, concept, style, steps=2, batch=n) for n in (5, 2))
    assert a.shape == (5, 3, 32, 32) and (a - b).abs().max() < 1e-4
    assert not torch.allclose(a, draw_emoji(small, states, concept, (style + 1) % 3, steps=2))
    assert not torch.allclose(a, draw_emoji(small, states, data.concept[30:35], style, steps=2))


def test_a_concept_of_another_split_is_refused(data, states):
    held_out = load("emoji", "test", 32).concept[:2]
    with pytest.raises(ValueError, match="not in the train split"):
        conditions(states, held_out, torch.zeros(2, dtype=torch.long))


def test_real_pictures_are_recognised_and_others_are_not(data):
    real = data.x.flatten(1)
    places = picked(data, 30, seed=0)
    assert len(data.concept[places].unique()) == 30 and data.style[places].bincount().tolist() == [10, 10, 10]
    nearest = nearest_real(real[places], real)
    assert torch.equal(nearest, places)
    concept, style = data.concept[places], data.style[places]
    right = recognised(nearest, concept, style, data)
    assert right == {"concept": 1.0, "style": 1.0, "both": 1.0}
    wrong = recognised(nearest_real(real[places].roll(1, 0), real), concept, style, data)
    assert wrong["concept"] == 0.0 and wrong["both"] == 0.0 and wrong["style"] == 0.0


def test_identification_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    real, style = torch.randn(40, 5, generator=generator), torch.arange(40) % 2
    places = torch.tensor([3, 8, 8, 31])
    drawn = real[places] + 0.7 * torch.randn(4, 5, generator=generator)
    wanted = 0
    for one, place in zip(drawn, places.tolist(), strict=True):
        cosine = torch.nn.functional.cosine_similarity(one[None], real)
        rivals = [i for i in range(40) if style[i] == style[place] and i != place]
        wanted += all(cosine[place] > cosine[i] for i in rivals)
    assert identified(drawn, places, real, style, rivals=19) == wanted / 4 and 0 < wanted < 4
    assert identified(real[places], places, real, style) == 1.0  # fewer rivals than asked for: all there are


def test_identification_of_anything_is_chance():
    generator = torch.Generator().manual_seed(1)
    real, drawn = torch.randn(400, 8, generator=generator), torch.randn(2000, 8, generator=generator)
    places = torch.randint(400, (2000,), generator=generator)
    share = identified(drawn, places, real, torch.zeros(400, dtype=torch.long), rivals=9)
    assert abs(share - 0.1) < 0.03
