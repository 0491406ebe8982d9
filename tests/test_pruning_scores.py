import pytest
import torch

from minilib.intervene import record_inputs
from minilib.models import DiT, UNet
from minilib.pruning.masks import find_sites, masked, ones
from minilib.pruning.scores import activation_magnitude, contribution, weight_magnitude


def dit():
    torch.manual_seed(0)
    model = DiT(input_size=4, hidden_size=8, depth=2, num_heads=2, mlp_ratio=2.0)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model.eval(), (torch.randn(3, 1, 4, 4), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2]))


def test_weight_magnitude_by_hand():
    model, _ = dit()
    scores = weight_magnitude(model)
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    rows = [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]
    parts = [attn.qkv.weight[rows], attn.qkv.bias[rows], attn.proj.weight[:, 4:]]
    want = torch.cat([p.detach().flatten() for p in parts]).norm()
    assert scores["blocks.1.attn"][1].item() == pytest.approx(want.item(), rel=1e-6)
    parts = [mlp.fc1.weight[3], mlp.fc1.bias[3:4], mlp.fc2.weight[:, 3]]
    want = torch.cat([p.detach().flatten() for p in parts]).norm()
    assert scores["blocks.1.mlp"][3].item() == pytest.approx(want.item(), rel=1e-6)


def test_weight_magnitude_of_a_gated_network_counts_both_rows():
    net = UNet(block_out_channels=(8, 16), attention_levels=(1,), norm_num_groups=4, cross_attention_dim=12)
    (name, score) = next((k, v) for k, v in weight_magnitude(net).items() if k.endswith(".ff"))
    ff = net.get_submodule(name)
    parts = [ff.proj.weight[[5, 69]], ff.proj.bias[[5, 69]], ff.out.weight[:, 5]]
    want = torch.cat([p.detach().flatten() for p in parts]).norm()
    assert score[5].item() == pytest.approx(want.item(), rel=1e-6)


def test_activations_by_hand_over_two_calls():
    model, call = dit()
    halves = [tuple(part[:1] for part in call), tuple(part[1:] for part in call)]
    with record_inputs(model, ["blocks.0.attn.proj", "blocks.0.mlp.fc2"]) as seen:
        for half in halves:
            model(*half)
    run = lambda: [model(*half) for half in halves]  # noqa: E731
    magnitudes, worth = activation_magnitude(model, run), contribution(model, run)
    for name, reader, width in (("blocks.0.attn", "attn.proj", 4), ("blocks.0.mlp", "mlp.fc2", 1)):
        calls = seen[f"blocks.0.{reader}"]
        unit = slice(width, 2 * width)  # the second one
        want = sum(h[..., unit].abs().mean() for h in calls) / 2
        assert magnitudes[name][1].item() == pytest.approx(want.item(), rel=1e-5)
        weight = model.blocks[0].get_submodule(reader).weight.detach()[:, unit]
        squares = sum(h[..., unit].square().mean((0, 1)) for h in calls) / 2
        want = (squares * weight.square().sum(0)).sum().sqrt()
        assert worth[name][1].item() == pytest.approx(want.item(), rel=1e-5)


def test_a_dead_unit_scores_zero():
    model, call = dit()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight[:, 2] = 0
    masks = {k: m for k, m in ones(find_sites(model)).items() if k == "blocks.1.attn"}
    masks["blocks.1.attn"][0] = 0
    with masked(model, masks):
        magnitudes, worth = (
            activation_magnitude(model, lambda: model(*call)),
            contribution(model, lambda: model(*call)),
        )
    assert worth["blocks.0.mlp"][2] == 0 < magnitudes["blocks.0.mlp"][2]
    assert magnitudes["blocks.1.attn"][0] == 0 and (worth["blocks.1.attn"] > 0).tolist() == [False, True]


def test_a_run_that_misses_a_layer():
    model, _ = dit()
    with pytest.raises(ValueError, match="never reached blocks.0.attn"):
        activation_magnitude(model, lambda: None)
