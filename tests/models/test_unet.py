import copy
import tomllib

import pytest
import tomli_w
import torch
import torch.nn.functional as F
from torch import nn

from minilib.attention import CrossAttention, attention_modules, attention_processor, record_attention
from minilib.models import UNet, sincos_2d, timestep_embedding
from minilib.models.unet_blocks import GEGLU, ResnetBlock, SpatialTransformer
from minilib.profiling import count_flops

TINY = {
    "block_out_channels": (8, 16, 16),
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "num_heads": 2,
}
OPTIONS = [
    {},
    {"attention_positions": True},
    {"attention_levels": (0, 1, 2), "transformer_layers": (1, 2, 1), "num_heads": (1, 2, 4)},
    {"attention_levels": (), "layers_per_block": 1},
    {"block_out_channels": (8, 8, 12, 16), "attention_levels": (3,)},
    {"block_out_channels": (8,), "attention_levels": (0,), "layers_per_block": 3},
    {"pooled_dim": 6, "in_channels": 7, "out_channels": 4, "norm_eps": 1e-3},
    {"cross_attention_dim": 0},
    {"patch_size": 2},
]


def randomised(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g) * (p.numel() / len(p)) ** -0.5)
    return model.eval()


def build(**options):
    return randomised(UNet(**{**TINY, **options}))


def inputs(model, height=8, width=8, length=5, b=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    c = model.config
    x = torch.randn(b, c["in_channels"], height, width, generator=g)
    text = c["cross_attention_dim"]
    context = torch.randn(b, length, text, generator=g) if text else None
    pooled = torch.randn(b, c["pooled_dim"], generator=g) if c["pooled_dim"] else None
    return x, torch.linspace(3.5, 900.0, b), context, None, pooled


def leaf_calls(model, run):
    """Names of the modules without children that run, in order."""
    called = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if not list(module.children()) and name
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return called


def inside(name, parents):
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


class TestShapes:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_every_option_keeps_the_canvas_and_rebuilds_from_its_config(self, options):
        model = build(**options)
        args = inputs(model, 12, 8)
        with torch.no_grad():
            out = model(*args)
        assert out.shape == (2, model.config["out_channels"], 12, 8)
        assert out.abs().max() > 0.1
        config = tomllib.loads(tomli_w.dumps(model.config))
        again = UNet(**config)
        assert again.config == model.config
        again.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(again.eval()(*args), out)

    @pytest.mark.parametrize("size", [(5, 7), (1, 1), (9, 4), (3, 16)])
    def test_odd_and_non_square_canvases(self, size):
        model = build(attention_positions=True)
        with torch.no_grad():
            assert model(*inputs(model, *size)).shape == (2, 3, *size)

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_gradients_reach_every_parameter(self, options):
        model = build(**options)
        model(*inputs(model, 16, 16)).square().sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name

    def test_a_fresh_model_predicts_zero_and_its_residual_branches_are_silent(self):
        model = UNet(**TINY)
        assert torch.equal(model(*inputs(model)), torch.zeros(2, 3, 8, 8))
        x = torch.randn(2, 16, 4, 4)
        attention, resnet = model.mid_block.attentions[0], model.mid_block.resnets[0]
        assert torch.equal(attention(x, torch.randn(2, 5, 12)), x)
        assert torch.equal(resnet(x, torch.randn(2, 32)), x)
        # Exactly these start at zero; anything more would never learn.
        silent = {
            n.rsplit(".", 1)[0] for n, p in model.named_parameters() if n.endswith("weight") and not p.any()
        }
        assert {n.rsplit(".", 1)[-1] for n in silent} == {"conv2", "proj_out", "conv_out"}

    def test_each_image_is_on_its_own(self):
        model = build()
        x, t, context, *_ = inputs(model, b=3)
        with torch.no_grad():
            together = model(x, t, context)
            for i in range(3):
                alone = model(x[i : i + 1], t[i : i + 1], context[i : i + 1])
                assert (alone - together[i : i + 1]).abs().max() < 1e-5

    def test_a_copy_is_independent(self):
        model = build()
        args = inputs(model)
        other = copy.deepcopy(model)
        with torch.no_grad():
            before = model(*args)
            other.down_blocks[0].resnets[0].conv1.weight.zero_()
            assert not torch.equal(other(*args), before)
            assert torch.equal(model(*args), before)

    def test_half_precision_by_autocast(self):
        model = build(attention_positions=True)
        args = inputs(model)
        with torch.no_grad():
            full = model(*args)
            with torch.autocast("cpu", torch.bfloat16):
                half = model(*args).float()
        assert 0 < (half - full).abs().max() < 0.1 * full.abs().max()


class TestPieces:
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_encoder_middle_and_decoder_in_any_cut_equal_forward_bit_for_bit(self, options):
        model = build(**options)
        x, t, context, _, pooled = inputs(model, 6, 10)
        mask = None if context is None else torch.tensor([[True] * 5, [True, True, False, False, False]])
        with torch.no_grad():
            whole = model(x, t, context, mask, pooled)
            emb = model.embed(t, pooled)
            last, skips = model.encode(x, emb, context, mask)
            assert len(skips) == model.num_skips and last is skips[-1]
            h = model.middle(last, emb, context, mask)
            for j in range(model.num_skips):
                cached = model.decode(h, skips, emb, context, mask, stop=j)
                few = skips[: model.num_skips - j]
                assert torch.equal(model.decode(cached, few, emb, context, mask, start=j), whole)
            for k in range(1, model.num_skips + 1):
                end, first = model.encode(x, emb, context, mask, stop=k)
                assert len(first) == k and end is first[-1]
                assert all(torch.equal(a, b) for a, b in zip(first, skips, strict=False))

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    def test_counts(self, options):
        model = build(**options)
        levels, layers = len(model.config["block_out_channels"]), model.config["layers_per_block"]
        # By hand: conv_in, every layer, and every downsampler makes a skip.
        assert model.num_skips == 1 + levels * layers + (levels - 1)
        assert len(model.down_units) == len(model.up_units) == model.num_skips
        assert model.skip_of_up_unit == tuple(range(model.num_skips))[::-1]

    def test_three_levels_of_two_layers_have_nine_skips(self):
        assert UNet().num_skips == 9

    def test_up_unit_j_reads_skip_n_minus_1_minus_j_and_no_other(self):
        model = build()
        x, t, context, *_ = inputs(model)
        emb = model.embed(t).detach()
        h, skips = model.encode(x, emb, context)
        n = model.num_skips
        for j in range(n):
            leaves = [s.detach().requires_grad_() for s in skips]
            with torch.no_grad():
                entering = model.decode(h, skips, emb, context, stop=j)
            after = j + 1 if j + 1 < n else None
            model.decode(entering, leaves, emb, context, start=j, stop=after).sum().backward()
            # Without a stop the last one also runs the head, which reads no skip.
            assert [i for i, s in enumerate(leaves) if s.grad is not None] == [model.skip_of_up_unit[j]]

    def test_a_trace_touches_nothing_deeper(self):
        model = build(attention_levels=(0, 1, 2))
        x, t, context, *_ = inputs(model)
        n = model.num_skips
        everything = {name for name, m in model.named_modules() if name and not list(m.children())}
        full = leaf_calls(model, lambda: model(x, t, context))
        assert set(full) == everything and len(full) == len(everything)
        with torch.no_grad():
            emb = model.embed(t)
            h, skips = model.encode(x, emb, context)
            h = model.middle(h, emb, context)
            entering = [model.decode(h, skips, emb, context, stop=j) for j in range(n)]
        for k in range(1, n + 1):
            called = leaf_calls(model, lambda k=k: model.encode(x, emb, context, stop=k))
            names = [name for unit in model.down_units[:k] for name in unit.names]
            assert set(called) == {m for m in everything if inside(m, names)}
        for j in range(n):
            called = leaf_calls(
                model, lambda j=j: model.decode(entering[j], skips[: n - j], emb, context, start=j)
            )
            names = [name for unit in model.up_units[j:] for name in unit.names]
            assert set(called) == {m for m in everything if inside(m, [*names, "conv_norm_out", "conv_out"])}
        middle = leaf_calls(model, lambda: model.middle(skips[-1], emb, context))
        assert set(middle) == {m for m in everything if inside(m, ["mid_block"])}
        named = [name for unit in (*model.down_units, *model.up_units) for name in unit.names]
        outside = {m for m in everything if not inside(m, named)}
        assert {m.split(".")[0] for m in outside} == {
            "time_embedding",
            "mid_block",
            "conv_norm_out",
            "conv_out",
        }

    def test_what_a_cache_would_keep_is_never_modified(self):
        model = build()
        x, t, context, *_ = inputs(model)
        with torch.no_grad():
            emb = model.embed(t)
            h, skips = model.encode(x, emb, context)
            h = model.middle(h, emb, context)
            for j in range(model.num_skips):
                entering = model.decode(h, skips, emb, context, stop=j)
                kept = [entering, emb, context, x, *skips]
                before = [tensor.clone() for tensor in kept]
                versions = [tensor._version for tensor in kept]
                model.decode(entering, skips, emb, context, start=j)
                assert [tensor._version for tensor in kept] == versions
                assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))

    def test_a_replaced_module_runs(self):
        model = build(block_out_channels=(8, 16), attention_levels=(1,), layers_per_block=1)
        args = inputs(model)
        names = [
            name for name, m in model.named_modules() if isinstance(m, (ResnetBlock, SpatialTransformer))
        ]
        for name in names:
            other = copy.deepcopy(model)
            parent, _, child = name.rpartition(".")
            other.get_submodule(parent)[int(child)] = Halved(other.get_submodule(name))
            with torch.no_grad():
                assert not torch.equal(other(*args), model(*args)), name


class Halved(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return 0.5 * self.inner(*args)


class TestCondition:
    def test_masked_tokens_change_nothing(self):
        model = build()
        x, t, context, *_ = inputs(model)
        mask = torch.tensor([[True, True, True, False, False], [True, True, False, False, False]])
        other = torch.where(mask[..., None], context, context * -3 + 1)
        with torch.no_grad():
            out = model(x, t, context, mask)
            assert torch.equal(model(x, t, other, mask), out)
            assert not torch.equal(model(x, t, other), model(x, t, context))
            assert (model(x[:1], t[:1], context[:1, :3]) - out[:1]).abs().max() < 1e-5
            assert (
                model(x, t, context, torch.ones(2, 5, dtype=torch.bool)) - model(x, t, context)
            ).abs().max() < 1e-5

    def test_time_and_pooled_text_enter_as_written(self):
        model = build(pooled_dim=6)
        _, t, _, _, pooled = inputs(model)
        state = model.state_dict()

        def mlp(name, v):
            v = v @ state[f"{name}.linear_1.weight"].T + state[f"{name}.linear_1.bias"]
            return F.silu(v) @ state[f"{name}.linear_2.weight"].T + state[f"{name}.linear_2.bias"]

        angles = t[:, None] * 10_000.0 ** (-torch.arange(4) / 4)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        assert (waves - timestep_embedding(t, 8)).abs().max() < 1e-4
        wanted = F.silu(mlp("time_embedding", waves) + mlp("pooled_embedding", pooled))
        assert (model.embed(t, pooled) - wanted).abs().max() < 1e-4
        assert torch.equal(
            model.embed(torch.tensor([7])[:1].expand(1), pooled[:1]),
            model.embed(torch.tensor([7.0]), pooled[:1]),
        )

    def test_positions_are_the_tokens_once_the_projection_is_silenced(self):
        for height, width in [(4, 6), (6, 4), (4, 6), (1, 5)]:
            layer = build(attention_positions=True).mid_block.attentions[0]
            seen = []
            layer.transformer_blocks[0].register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            nn.init.zeros_(layer.proj_in.weight)
            nn.init.zeros_(layer.proj_in.bias)
            layer(torch.randn(2, 16, height, width), torch.randn(2, 5, 12))
            assert torch.equal(seen[0], sincos_2d(16, height, width).expand(2, -1, -1))

    def test_positions_remember_the_right_canvas(self):
        model = build(attention_positions=True)
        with torch.no_grad():
            fresh = [copy.deepcopy(model)(*inputs(model, *size)) for size in [(4, 8), (8, 4)]]
            for size, wanted in zip([(4, 8), (8, 4), (4, 8)], [*fresh, fresh[0]], strict=True):
                assert torch.equal(model(*inputs(model, *size)), wanted)

    @pytest.mark.parametrize("positions", [False, True])
    def test_without_positions_a_transformer_cannot_tell_pixels_apart(self, positions):
        layer = build(attention_positions=positions).mid_block.attentions[0]
        x, context = torch.randn(1, 16, 4, 4), torch.randn(1, 5, 12)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        shuffled = x.flatten(2)[:, :, order].view_as(x)
        with torch.no_grad():
            error = layer(shuffled, context).flatten(2) - layer(x, context).flatten(2)[:, :, order]
        assert (error.abs().max() < 1e-5) == (not positions)

    def test_patches_are_pixels_as_channels(self):
        model = build(patch_size=2)
        inner = UNet(**{**TINY, "in_channels": 12, "out_channels": 12}).eval()
        inner.load_state_dict(model.state_dict())
        x, t, context, *_ = inputs(model, 8, 4)
        with torch.no_grad():
            small = inner(F.pixel_unshuffle(x, 2), t, context)
            assert torch.equal(model(x, t, context), F.pixel_shuffle(small, 2))

    def test_attention_can_be_recorded_and_replaced(self):
        model = build(attention_levels=(1, 2))
        args = inputs(model)
        # 2 + 2 layers down, 1 in the middle, 3 + 3 up, each with self- and cross-attention.
        assert len(attention_modules(model)) == 22
        with torch.no_grad():
            plain = model(*args)
            with record_attention(model) as weights:
                assert torch.equal(model(*args), plain)
            for name, (calls,) in weights.items():
                keys = 5 if name.endswith("attn2") else calls.shape[2]
                assert calls.shape[1] == 2 and calls.shape[3] == keys
                assert (calls.sum(-1) - 1).abs().max() < 1e-5
            with attention_processor(model, lambda name, _: silent if name.endswith("attn2") else None):
                mute = model(*args)
                assert torch.equal(model(args[0], args[1], -args[2]), mute)
            assert torch.equal(model(*args), plain) and not torch.equal(mute, plain)


def silent(q, k, v, *, mask=None):
    return torch.zeros_like(q)


class TestCrossAttention:
    @pytest.mark.parametrize("variant", ["full", "naive"])
    def test_equals_a_loop_over_heads(self, variant):
        layer = randomised(CrossAttention(12, 10, num_heads=3, variant=variant))
        x, context = torch.randn(2, 4, 12), torch.randn(2, 5, 10)
        mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
        q, k, v = x @ layer.to_q.weight.T, context @ layer.to_k.weight.T, context @ layer.to_v.weight.T
        heads = []
        for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
            logits = torch.einsum("bnd,bmd->bnm", q[..., part], k[..., part]) / 2.0
            weights = logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
            heads.append(weights @ v[..., part])
        wanted = torch.cat(heads, -1) @ layer.to_out.weight.T + layer.to_out.bias
        assert wanted.abs().max() > 0.1
        assert (layer(x, context, mask) - wanted).abs().max() < 1e-5

    def test_without_context_it_reads_itself(self):
        layer = randomised(CrossAttention(12, num_heads=2))
        x = torch.randn(2, 4, 12)
        assert torch.equal(layer(x), layer(x, x))
        assert {name for name, _ in layer.named_parameters()} == {
            *(f"to_{part}.weight" for part in ("q", "k", "v", "out")),
            "to_out.bias",
        }

    def test_bad_input_is_named(self):
        with pytest.raises(ValueError, match="5 heads do not divide the width 12"):
            CrossAttention(12, num_heads=5)
        with pytest.raises(ValueError, match="context of width 9 given, this layer reads width 10"):
            CrossAttention(12, 10, num_heads=2)(torch.zeros(1, 4, 12), torch.zeros(1, 3, 9))
        with pytest.raises(ValueError, match="unknown attention 'none'"):
            CrossAttention(12, variant="none", num_heads=2)


def test_geglu_is_value_times_gelu_of_the_gate():
    layer = randomised(GEGLU(6))
    x = torch.randn(2, 3, 6)
    h = x @ layer.proj.weight.T + layer.proj.bias
    value, gate = h[..., :24], h[..., 24:]
    wanted = value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    assert (layer(x) - (wanted @ layer.out.weight.T + layer.out.bias)).abs().max() < 1e-5


class TestErrors:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"block_out_channels": (8, 18)}, r"multiple of norm_num_groups = 4.*\(8, 18\)"),
            ({"block_out_channels": (9, 18), "norm_num_groups": 9}, "the first even"),
            ({"block_out_channels": ()}, "at least one level and one layer"),
            ({"layers_per_block": 0}, "at least one level and one layer"),
            ({"attention_levels": (1, 3)}, r"attention_levels \[3\] do not exist: the levels are 0 to 2"),
            ({"num_heads": (2, 2)}, "num_heads has to be a positive number, or one for each of 3 levels"),
            ({"transformer_layers": 0}, "transformer_layers has to be a positive number"),
            ({"num_heads": 3}, "3 heads do not divide the width 16"),
            (
                {"attention_positions": True, "block_out_channels": (8, 18, 18), "norm_num_groups": 2},
                "multiple of 4, got 18",
            ),
        ],
    )
    def test_bad_sizes_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            build(**options)

    def test_bad_input_is_named(self):
        model = build()
        x, t, context, *_ = inputs(model)
        cases = [
            ((x[:, :2], t, context), "an input of 2 channels given, this model takes 3"),
            ((x, t), r"reads text states \(b, l, 12\) as context, got none"),
            ((x, t, context[..., :5]), r"reads text states \(b, l, 12\) as context, got shape \(2, 5, 5\)"),
            (
                (x, t, context, None, torch.zeros(2, 6)),
                r"pooled text of width 6 given \(0: none\), this model reads width 0",
            ),
        ]
        for args, message in cases:
            with pytest.raises(ValueError, match=message):
                model(*args)
        with pytest.raises(ValueError, match="reads no text as context, got shape"):
            build(cross_attention_dim=0)(x, t, context)
        for pooled in (None, torch.zeros(2, 5)):
            with pytest.raises(ValueError, match="this model reads width 6"):
                build(pooled_dim=6)(x, t, context, None, pooled)
        with pytest.raises(ValueError, match="patches of 2 do not tile an image of 8 x 7"):
            build(patch_size=2)(x[..., :7], t, context)

    def test_bad_cuts_are_named(self):
        model = build()
        x, t, context, *_ = inputs(model)
        emb = model.embed(t)
        h, skips = model.encode(x, emb, context)
        for stop in (0, 10, -1):
            with pytest.raises(ValueError, match=f"stop counts down units, 1 to 9; got {stop}"):
                model.encode(x, emb, context, stop=stop)
        for start, stop in ((-1, None), (9, None), (3, 2), (0, 10)):
            with pytest.raises(ValueError, match=f"got start={start}, stop={stop}"):
                model.decode(h, skips, emb, context, start=start, stop=stop)
        with pytest.raises(ValueError, match="up units from 4 on consume the first 5 skips, got 4"):
            model.decode(h, skips[:4], emb, context, start=4)
        with pytest.raises(ValueError, match=r"main branch \(2, 16, 2, 2\) and the skip .* do not fit"):
            model.decode(h, skips, emb, context, start=8)
        with pytest.raises(ValueError, match="reads text states"):
            model.middle(h, emb)
        with pytest.raises(ValueError, match="reads text states"):
            model.decode(h, skips, emb)


@pytest.mark.parametrize(
    "size, options, skips, mflop",
    [
        (16, {"block_out_channels": (24, 48, 64)}, 9, 164.1),
        (32, {"block_out_channels": (24, 48, 64), "patch_size": 2}, 9, 166.1),
        (32, {"block_out_channels": (16, 16, 32, 64), "attention_levels": (2, 3)}, 12, 169.9),
    ],
)
def test_cost_of_the_small_configurations(size, options, skips, mflop):
    with torch.device("meta"):
        model = UNet(attention_positions=True, **options)
        args = torch.zeros(1, 3, size, size), torch.zeros(1), torch.zeros(1, 12, 64)
    assert model.num_skips == skips
    assert count_flops(model, *args).flops / 1e6 == pytest.approx(mflop, abs=0.06)
