import pytest
import torch

from minilib import operator_costs as oc
from minilib.costs import dit_flops, fit_exponent
from minilib.models import DIT_CONFIGS, DiT, UNet
from minilib.models.autoregressive import AutoregressiveTransformer
from minilib.models.unet_configs import UNET_CONFIGS
from minilib.models.video import FactorisedBlock
from minilib.operators import count_operators

UNETS = {
    "default": ({}, 16, 16, 7),
    "no text": ({"cross_attention_dim": 0, "attention_levels": (0,)}, 16, 16, 0),
    "odd sides": ({"cross_attention_dim": 24}, 13, 11, 3),
    "patches and pooled": ({"patch_size": 2, "pooled_dim": 10, "cross_attention_dim": 24}, 20, 12, 3),
    "per level": (
        {
            "block_out_channels": (16, 32, 32),
            "num_heads": (2, 4, 8),
            "transformer_layers": (1, 2, 3),
            "layers_per_block": 1,
            "in_channels": 5,
            "out_channels": 2,
        },
        16,
        8,
        4,
    ),
    "one level": ({"block_out_channels": (16,), "attention_levels": (), "cross_attention_dim": 8}, 4, 4, 2),
    "SD 1.5": (UNET_CONFIGS["SD 1.5"], 64, 64, 77),
    "SDXL": (UNET_CONFIGS["SDXL"], 128, 128, 77),
}


def unet_trace(config, height, width, text, batch=1):
    with torch.device("meta"):
        model = UNet(**config)
    c = model.config
    args = [torch.zeros(batch, c["in_channels"], height, width), torch.zeros(batch)]
    args.append(torch.zeros(batch, text, c["cross_attention_dim"]) if text else None)
    pooled = torch.zeros(batch, c["pooled_dim"]) if c["pooled_dim"] else None
    return count_operators(model, *args, pooled=pooled)


def by_kind(flops):
    return {
        "attention": flops.attention,
        "convolution": flops.convolution,
        "linear": flops.linear,
        "norm": 0,
        "other": 0,
    }


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_unet_to_the_integer(name, batch):
    config, height, width, text = UNETS[name]
    trace = unet_trace(config, height, width, text, batch)
    assert trace.flops == by_kind(oc.unet_operator_flops(config, height, width, text, batch=batch))
    calls = oc.unet_attention_calls(config, height, width, text, batch=batch)
    assert trace.lengths == [(call.queries, call.keys) for call in calls]
    assert sum(call.flops for call in calls) == trace.flops["attention"]


@pytest.mark.parametrize("name", UNETS)
def test_bytes_of_the_convolutions(name):
    config, height, width, text = UNETS[name]
    with torch.device("meta"):
        model = UNet(**config)
    written = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, args, out: written.append(out.nbytes))
    c = model.config
    pooled = torch.zeros(2, c["pooled_dim"], device="meta") if c["pooled_dim"] else None
    context = torch.zeros(2, text, c["cross_attention_dim"], device="meta") if text else None
    model(
        torch.zeros(2, c["in_channels"], height, width, device="meta"),
        torch.zeros(2, device="meta"),
        context,
        pooled=pooled,
    )
    assert sum(written) == oc.unet_convolution_bytes(config, height, width, batch=2)


@pytest.mark.parametrize(
    "config", [{"hidden_size": 32, "depth": 3, "input_size": 8, "patch_size": 2}, DIT_CONFIGS["DiT-XL/2"]]
)
def test_a_dit_to_the_integer(config):
    with torch.device("meta"):
        model = DiT(**config)
    c = model.config
    x = torch.zeros(2, c["in_channels"], c["input_size"], c["input_size"])
    flops = oc.dit_operator_flops(config, batch=2)
    assert count_operators(model, x, torch.zeros(2), torch.zeros(2, dtype=torch.long)).flops == by_kind(flops)
    assert flops.total == dit_flops(config, batch=2)


AR = {"vocab_size": 11, "hidden_size": 16, "depth": 3, "num_heads": 2, "max_length": 20, "mlp_ratio": 3.0}


@pytest.mark.parametrize("queries, keys", [(9, 9), (1, 9), (4, 9), (1, 1)])
def test_prefill_and_decoding_to_the_integer(queries, keys):
    model = AutoregressiveTransformer(**AR).to("meta")

    class Pass(torch.nn.Module):
        def forward(self, tokens):
            caches = model.make_caches(len(tokens))
            for cache in caches:
                if keys > queries:
                    cache.append(*torch.zeros(2, len(tokens), 2, keys - queries, 8, device="meta").unbind())
            return model.prefill(tokens, caches)

    trace = count_operators(Pass(), torch.zeros(2, queries, dtype=torch.long))
    assert trace.flops == by_kind(oc.autoregressive_flops(AR, queries, keys, batch=2))
    assert trace.lengths == [(queries, keys)] * 3


def test_training_makes_all_logits():
    model = AutoregressiveTransformer(**AR)
    trace = count_operators(model, torch.zeros(2, 9, dtype=torch.long))
    assert trace.flops == by_kind(oc.autoregressive_flops(AR, 9, batch=2, logits=9))


@pytest.mark.parametrize("frames, places, ratio", [(3, 4, 4.0), (1, 6, 2.0), (5, 1, 4.0)])
def test_a_video_block_to_the_integer(frames, places, ratio):
    block = FactorisedBlock(16, 2, (frames, places), mlp_ratio=ratio)
    trace = count_operators(block, torch.zeros(2, frames * places, 16))
    assert trace.flops == by_kind(oc.factorised_block_flops(2, frames, places, 16, mlp_ratio=ratio))
    spatial, temporal = oc.spatial_flops(2, frames, places, 16), oc.temporal_flops(2, frames, places, 16)
    assert [call.flops for call in trace.calls if call.kind == "attention"] == [spatial, temporal]
    assert spatial * frames == temporal * places


def test_the_score_matrices_grow_with_the_fourth_power_of_the_side():
    sides, own, cross, maps = (32, 64, 128, 256), [], [], []
    for side in sides:
        calls = oc.unet_attention_calls(UNET_CONFIGS["SD 1.5"], side, side, 77)
        own.append(oc.score_matrix_bytes(calls[::2]))
        cross.append(oc.score_matrix_bytes(calls[1::2]))
        maps.append(oc.unet_convolution_bytes(UNET_CONFIGS["SD 1.5"], side, side))
    for values, slope in ((own, 4), (cross, 2), (maps, 2)):
        assert fit_exponent(sides, values).value == pytest.approx(slope, abs=1e-9)


def test_score_matrices_by_hand():
    calls = [oc.AttentionCall(2, 3, 5, 7, 11), oc.AttentionCall(1, 1, 2, 2, 4)]
    assert oc.score_matrix_bytes(calls, itemsize=2) == 2 * (2 * 3 * 5 * 7 + 4)


def test_sums_and_shares():
    flops = oc.OperatorFlops(1, 2, 1).plus(oc.OperatorFlops(1, 0, 3))
    assert flops == (2, 2, 4) and flops.total == 8 and flops.share("attention") == 0.25
    with pytest.raises(ValueError, match="unknown kind 'norm'"):
        flops.share("norm")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: oc.unet_operator_flops({"width": 3}, 8, 8, 5), "unknown options"),
        (lambda: oc.unet_operator_flops({}, 8, 8, 0), "this U-Net reads text"),
        (lambda: oc.unet_operator_flops({"cross_attention_dim": 0}, 8, 8, 5), "this U-Net reads no text"),
        (lambda: oc.unet_operator_flops({"patch_size": 2}, 7, 8, 5), "patches of 2 do not tile it"),
        (lambda: oc.unet_convolution_bytes({}, 0, 8), "do not tile it"),
        (lambda: oc.autoregressive_flops(AR, 5, 4), "1 <= queries <= keys"),
        (lambda: oc.autoregressive_flops(AR, 0), "1 <= queries <= keys"),
        (
            lambda: oc.dit_operator_flops({**DIT_CONFIGS["DiT-S/2"], "attention": "linear"}),
            "attention = 'linear'",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
