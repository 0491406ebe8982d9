import pytest
import torch

from minilib.attention import record_attention
from minilib.models import ViT
from minilib.profiling import count_parameters

TINY = {"image_size": 8, "patch_size": 2, "hidden_size": 8, "depth": 3, "num_heads": 2}
VARIANTS = [{}, {"class_token": True}, {"num_registers": 2}, {"class_token": True, "num_registers": 3}]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS, ids=str)
def vit(request):
    torch.manual_seed(0)
    return ViT(**TINY, **request.param).eval()


def test_shapes_config_and_any_canvas(vit):
    prefix = int(vit.config["class_token"]) + vit.config["num_registers"]
    again = ViT(**vit.config).eval()
    again.load_state_dict(vit.state_dict())
    for height, width in ((8, 8), (4, 10)):
        x, n = randn(3, 3, height, width), height * width // 4
        assert vit(x).shape == (3, prefix + n, 8)
        assert torch.equal(vit.features(x), vit(x)[:, prefix:])
        assert torch.equal(again.features(x), vit.features(x))
        wanted = vit(x)[:, 0] if vit.config["class_token"] else vit(x)[:, prefix:].mean(1)
        torch.testing.assert_close(vit.pooled(x), wanted)


def test_layers_come_in_the_order_asked_for(vit):
    x = randn(2, 3, 8, 8)
    third, start, first = vit.layer_features(x, (3, 0, 1))
    torch.testing.assert_close(vit.norm(third), vit.features(x))
    torch.testing.assert_close(start, vit.embed(x)[:, vit.num_prefix :])
    torch.testing.assert_close(first, vit.blocks[0](vit.embed(x))[:, vit.num_prefix :])
    assert vit.layer_features(x, ()) == []
    with pytest.raises(ValueError, match="0, the embedding, to 3; got \\[4\\]"):
        vit.layer_features(x, [4])


def test_a_hidden_patch_is_not_seen_and_keeps_its_place(vit):
    x, mask = randn(2, 3, 8, 8), torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 5] = True  # row 1, column 1: pixels 2:4 of both axes
    other = x.clone()
    other[0, :, 2:4, 2:4] += 1.0
    torch.testing.assert_close(vit(x, mask), vit(other, mask))
    assert (vit(x) - vit(other)).abs().max() > 1e-3
    assert torch.equal(vit(x, mask)[1], vit(x)[1])
    everything = vit.embed(x, torch.ones(2, 16, dtype=torch.bool))[:, vit.num_prefix :]
    assert torch.equal(everything[0], everything[1]) and len(everything[0].unique(dim=0)) == 16
    with pytest.raises(ValueError, match="mask of 9 patches given, the image has 4 x 4"):
        vit(x, torch.zeros(2, 9, dtype=torch.bool))


def test_without_positions_it_would_not_care_for_the_order():
    """Moving a patch changes the features by more than moving the tokens along."""
    torch.manual_seed(0)
    vit, x = ViT(**TINY).eval(), randn(1, 3, 8, 8)
    rolled = vit.features(x.roll(2, dims=3)).view(4, 4, 8)
    moved = vit.features(x).view(4, 4, 8).roll(1, dims=1)
    assert (rolled - moved).abs().max() > 0.05


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    vit = ViT(**TINY, class_token=True, num_registers=1)
    mask = torch.arange(16).expand(2, -1) % 3 == 0
    vit(randn(2, 3, 8, 8), mask).square().sum(2)[:, ::2].sin().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vit.parameters())


def test_attention_is_found_by_the_recorder():
    vit = ViT(**TINY)
    with record_attention(vit) as record:
        vit(randn(1, 3, 8, 8))
    assert len(record) == 3


def test_vit_b_16_has_the_published_size():
    """With classifier and learned positions (Dosovitskiy et al., table 1: 86 M); ours has a mask token instead."""
    with torch.device("meta"):
        vit = ViT(image_size=224, patch_size=16, hidden_size=768, depth=12, num_heads=12, class_token=True)
    classifier, positions, mask_token = 768 * 1000 + 1000, 197 * 768, 768
    assert count_parameters(vit) + classifier + positions - mask_token == 86_567_656


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden_size": 6, "num_heads": 2}, "multiple of 4, got 6"),
        ({"num_heads": 3}, "3 heads do not divide"),
        ({"patch_size": 3}, "patches of 3 do not tile an image of 8 x 8"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ViT(**{**TINY, **options})


def test_bad_images():
    with pytest.raises(ValueError, match="images of 1 channels given, this model takes 3"):
        ViT(**TINY)(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="do not tile an image of 8 x 9"):
        ViT(**TINY)(torch.zeros(1, 3, 8, 9))
