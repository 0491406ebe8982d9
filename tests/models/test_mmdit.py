import copy
import inspect
import json
import pickle

import pytest
import torch
import torch.nn.functional as F

from minilib.attention import attention_processor, full_attention, record_attention
from minilib.models.mmdit import POSITIONS, MMDiT
from minilib.models.mmdit_blocks import MMDiTBlock, SincosPositions
from minilib.models.positions import sincos_2d
from minilib.models.text import TextMMDiT
from minilib.profiling import count_flops

SMALL = {"patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 3, "num_heads": 2, "context_dim": 5}
CROPPED = {"positions": "sincos_cropped", "pos_embed_max_size": 9, "sample_size": 8}
LENGTH = 4


def randomised(model, seed=0, scale=0.25):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * scale)
    return model.eval()


def small(**options):
    return randomised(MMDiT(**{**SMALL, **options}))


def batch(n=3, size=(8, 12), seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 3, *size, generator=g, dtype=dtype),
        torch.rand(n, generator=g) * 1000,
        torch.randn(n, LENGTH, 5, generator=g, dtype=dtype),
    )


def mask_of(*lengths):
    return torch.arange(LENGTH) < torch.tensor(lengths)[:, None]


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


class TestInitialisation:
    def test_output_is_zero_and_blocks_are_the_identity(self):
        model = MMDiT(**SMALL, dual_attention_layers=[1], pooled_dim=6)
        assert torch.equal(model(*batch(), pooled=torch.randn(3, 6)), torch.zeros(3, 3, 8, 12))
        x, context, c = torch.randn(2, 24, 16), torch.randn(2, 4, 16), torch.randn(2, 16)
        for block in model.blocks:
            out = block(x, context, c)
            assert torch.equal(out[0], x) and torch.equal(out[1], context)

    def test_spread_of_the_weights(self):
        torch.manual_seed(0)
        model = MMDiT(hidden_size=128, depth=2, context_dim=128, pooled_dim=128)
        block = model.blocks[0]
        attn = (block.attn.qkv, block.attn.context_qkv, block.attn.proj, block.attn.context_proj)
        mlps = (block.mlp.fc1, block.context_mlp.fc2)
        for linear in (*attn, *mlps, model.context_embedder):
            bound = (6 / sum(linear.weight.shape)) ** 0.5
            assert 0.97 * bound < linear.weight.abs().max() <= bound and (linear.bias == 0).all()
        for linear in (model.t_embedder.fc1, model.t_embedder.fc2, model.pooled_embedder.fc1):
            assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.05)

    @pytest.mark.parametrize("positions", POSITIONS)
    def test_gradient_reaches_first_the_output_layer_then_everything(self, positions):
        options = {**CROPPED, "positions": positions, "dual_attention_layers": [0, 2], "pooled_dim": 6}
        model, pooled = MMDiT(**{**SMALL, **options}), torch.randn(3, 6)
        model(*batch(), pooled=pooled).sum().backward()
        touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert touched == {"final_layer.linear.weight", "final_layer.linear.bias"}
        randomised(model).zero_grad()
        model(*batch(), mask_of(2, 4, 3), pooled).square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters())


class TestForward:
    @pytest.mark.parametrize("positions", POSITIONS)
    @pytest.mark.parametrize("size", [(8, 8), (4, 12), (2, 2)])
    def test_any_canvas(self, positions, size):
        model = small(**{**CROPPED, "positions": positions})
        assert model(*batch(size=size)).shape == (3, 3, *size)

    def test_channels_and_patches(self):
        assert small(out_channels=5, patch_size=4)(*batch()).shape == (3, 5, 8, 12)
        assert small(patch_size=1)(*batch()).shape == (3, 3, 8, 12)

    def test_each_image_by_itself(self):
        model, inputs = small(), (*batch(), mask_of(2, 4, 1))
        together = model(*inputs)
        for i in range(3):
            close(together[i : i + 1], model(*(part[i : i + 1] for part in inputs)))

    def test_every_input_matters(self):
        model = small(pooled_dim=6)
        x, t, context = batch()
        mask, pooled = mask_of(3, 3, 3), torch.randn(3, 6)
        base = model(x, t, context, mask, pooled)
        others = [
            (x + 0.1, t, context, mask, pooled),
            (x, t + 5, context, mask, pooled),
            (x, t, context + 0.1, mask, pooled),
            (x, t, context, mask_of(2, 2, 2), pooled),
            (x, t, context, mask, pooled + 0.1),
        ]
        for other in others:
            assert (model(*other) - base).abs().amax((1, 2, 3)).min() > 1e-4

    def test_padded_text_changes_exactly_nothing(self):
        model, (x, t, context) = small(dual_attention_layers=[1]), batch(n=2)
        mask = mask_of(2, 4)
        context = context.requires_grad_()
        out = model(x, t, context, mask)
        (gradient,) = torch.autograd.grad(out.square().sum(), context)
        assert (gradient[~mask] == 0).all() and (gradient[mask].abs().amax(-1) > 0).all()
        changed = torch.where(mask[..., None], context, 100.0)
        assert torch.equal(model(x, t, changed, mask), out)
        close(model(x[:1], t[:1], context[:1, :2]), out[:1])

    def test_gradients(self):
        model = small(depth=2, dual_attention_layers=[0]).double()
        x, t, context = batch(n=1, size=(2, 4), dtype=torch.float64)
        names = [
            "blocks.0.context_adaLN_modulation.weight",
            "blocks.0.attn.k_norm.weight",
            "context_embedder.bias",
        ]
        values = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]

        def run(x, *parameters):
            return torch.func.functional_call(
                model, dict(zip(names, parameters, strict=True)), (x, t, context)
            )

        # Rotary tables are complex64, so the function itself is exact to about 1e-7.
        assert torch.autograd.gradcheck(run, (x.requires_grad_(), *values), fast_mode=True, atol=1e-4)

    def test_autocast_stays_close_to_float32(self):
        model, inputs = small(), (*batch(), mask_of(2, 4, 3))
        with torch.autocast("cpu", torch.bfloat16):
            half = model(*inputs)
        full = model(*inputs)
        assert (half.float() - full).abs().max() < 0.05 * full.abs().max()
        half.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


class TestPositions:
    def test_permuting_tokens_with_their_ids_permutes_the_output(self):
        model, (x, t, context) = small(dual_attention_layers=[1]), batch()
        g = torch.Generator().manual_seed(3)
        order = torch.randperm(24, generator=g)
        ids, c = model.position_ids(4, 6), F.silu(model.embed_condition(t))
        h, text = model.embed(x, ids), model.embed_context(context)
        straight, straight_text = model.run_blocks(h, c, text, ids)
        permuted, permuted_text = model.run_blocks(h[:, order], c, text, ids[order])
        close(permuted, straight[:, order])
        close(permuted_text, straight_text)
        assert (model.run_blocks(h[:, order], c, text, ids)[0] - straight[:, order]).abs().max() > 1e-2

    def test_shifting_canvas_and_text_together_changes_nothing(self):
        model, inputs = small(dual_attention_layers=[1]), batch()
        ids, context_ids = model.position_ids(4, 6), torch.zeros(LENGTH, 2)
        base = model(*inputs)
        close(model(*inputs, position_ids=ids, context_ids=context_ids), base)
        shift = torch.tensor([2.5, -7.0])
        close(model(*inputs, position_ids=ids + shift, context_ids=context_ids + shift), base, atol=1e-4)
        assert (model(*inputs, position_ids=ids + shift) - base).abs().max() > 1e-2, (
            "text stays at the origin"
        )

    def test_shifting_the_canvas_alone_changes_nothing_without_text(self):
        model, inputs = small(), (*batch(), torch.zeros(3, LENGTH, dtype=torch.bool))
        ids = model.position_ids(4, 6)
        close(model(*inputs, position_ids=ids + 11), model(*inputs), atol=1e-4)
        assert (model(*inputs, position_ids=ids * 2) - model(*inputs)).abs().max() > 1e-2

    @pytest.mark.parametrize("positions", POSITIONS)
    def test_ids_of_each_sample(self, positions):
        model, inputs = small(**{**CROPPED, "positions": positions}), batch(n=2)
        ids = model.position_ids(4, 6)
        both = model(*inputs, position_ids=torch.stack([ids, ids.flip(0)]))
        close(both[:1], model(*(part[:1] for part in inputs)))
        close(both[1:], model(*(part[1:] for part in inputs), position_ids=ids.flip(0)))
        assert (both[1:] - model(*(part[1:] for part in inputs))).abs().max() > 1e-2

    def test_sincos_is_the_fixed_table_on_any_grid(self):
        model = small(positions="sincos")
        x = batch()[0]
        close(model.embed(x), model.x_embedder(x) + sincos_2d(16, 4, 6), atol=1e-6)
        half = SincosPositions(8)(torch.tensor([[0.5, 2.0]]))
        neighbours = SincosPositions(8)(torch.tensor([[0.0, 2.0], [1.0, 2.0]]))
        assert torch.equal(half[0, :4], neighbours[0, :4])
        close(half[0, 4:6], torch.tensor([0.5, 0.005]).sin(), atol=1e-6)

    def test_cropped_uses_the_middle_of_its_table(self):
        model = small(**CROPPED)
        assert model.position_ids(4, 6)[[0, -1]].tolist() == [[2, 1], [5, 6]]
        table = model.positions.table.view(9, 9, 16)
        x = batch()[0]
        expected = model.x_embedder(x) + table[2:6, 1:7].reshape(24, 16)
        assert torch.equal(model.embed(x), expected)
        assert "positions.table" in model.state_dict()

    def test_base_of_the_rotary_frequencies(self):
        assert small(rope_theta=100.0).rotary.theta == 100.0
        assert small(rope_axes_dims=[2, 6]).rotary.axes_dims == (2, 6)

    def test_interpolation_turns_a_larger_canvas_as_far_as_the_smaller_one(self):
        x, t, context = batch(size=(16, 24))
        plain, wide = small(), small(rope_interpolation=2.0)
        ids = plain.position_ids(8, 12)
        close(wide(x, t, context), plain(x, t, context, position_ids=ids / 2), atol=1e-6)
        assert (wide(x, t, context) - plain(x, t, context)).abs().max() > 1e-3
        again = MMDiT(**wide.config)
        again.load_state_dict(wide.state_dict())
        assert torch.equal(again(x, t, context), wide(x, t, context))
        assert torch.equal(pickle.loads(pickle.dumps(wide))(x, t, context), wide(x, t, context))

    def test_interpolation_is_for_rotary_positions(self):
        with pytest.raises(ValueError, match="rope_interpolation is for positions='rope'"):
            MMDiT(**SMALL, positions="sincos", rope_interpolation=2.0)
        with pytest.raises(ValueError, match="positive factor, got 0"):
            MMDiT(**SMALL, rope_interpolation=0.0)


class TestParts:
    """The public parts of ``forward``: some tokens only, more tokens, several conditions, some blocks."""

    def parts(self, model, x, t, context):
        ids = model.position_ids(x.shape[2] // 2, x.shape[3] // 2)
        return model.embed(x, ids), F.silu(model.embed_condition(t)), model.embed_context(context), ids

    def test_forward_is_its_parts(self):
        model, inputs = small(), batch()
        h, c, context, ids = self.parts(model, *inputs)
        h, _ = model.run_blocks(h, c, context, ids)
        assert torch.equal(model.unpatchify(model.read_out(h, c), 4, 6), model(*inputs))

    def test_in_two_goes(self):
        model, inputs = small(), batch()
        h, c, context, ids = self.parts(model, *inputs)
        whole, whole_text = model.run_blocks(h, c, context, ids)
        h, text = model.run_blocks(h, c, context, ids, stop=1)
        assert not torch.equal(text, context)
        h, text = model.run_blocks(h, c, text, ids, start=1)
        assert torch.equal(h, whole) and torch.equal(text, whole_text)

    def test_some_of_the_tokens_with_all_keys_kept(self):
        """Active tokens alone, with the other keys and values remembered, give what they give among all tokens."""
        model, inputs = small(), batch()
        h, c, context, ids = self.parts(model, *inputs)
        active, n, kept = torch.tensor([1, 4, 5, 20]), 24, {}

        def remember(name, layer):
            def process(q, k, v, *, mask=None):
                kept[name] = k, v
                return full_attention(q, k, v, mask=mask)

            return process

        def recall(name, layer):
            def process(q, k, v, *, mask=None):
                full_k, full_v = (part.clone() for part in kept[name])
                rows = torch.cat([active, torch.arange(n, n + LENGTH)])
                full_k[:, :, rows], full_v[:, :, rows] = k, v
                return full_attention(q, full_k, full_v, mask=mask)

            return process

        with attention_processor(model, remember):
            expected, _ = model.run_blocks(h, c, context, ids)
        with attention_processor(model, recall):
            some, _ = model.run_blocks(h[:, active], c, context, ids[active])
        close(some, expected[:, active])

    def test_appended_tokens_hidden_by_a_mask_change_nothing(self):
        model, inputs = small(dual_attention_layers=[0]), batch()
        h, c, context, ids = self.parts(model, *inputs)
        extra = torch.randn(3, 5, 16)
        more, more_ids = torch.cat([h, extra], 1), torch.cat([ids, torch.rand(5, 2)])
        mask = torch.ones(24 + 5 + LENGTH, 24 + 5 + LENGTH, dtype=torch.bool)
        mask[:, 24:29] = False
        mask[24:29, 24:29] = True
        hidden, text = model.run_blocks(more, c, context, more_ids, mask=mask, context_mask=mask_of(2, 4, 3))
        plain, plain_text = model.run_blocks(h, c, context, ids, context_mask=mask_of(2, 4, 3))
        close(hidden[:, :24], plain)
        close(text, plain_text)
        seen, _ = model.run_blocks(more, c, context, more_ids)
        assert (seen[:, :24] - model.run_blocks(h, c, context, ids)[0]).abs().max() > 1e-2

    def test_several_conditions(self):
        """Each token is modulated by its group's condition; the context by the first."""
        model, (x, t, context) = small(dual_attention_layers=[1]), batch()
        h, c, context, ids = self.parts(model, x, t, context)
        other = F.silu(model.embed_condition(torch.zeros(3)))
        plain = model.run_blocks(h, c, context, ids)
        groups = torch.zeros(24, dtype=torch.long)
        same = model.run_blocks(h, torch.stack([c, other], 1), context, ids, groups=groups)
        close(same[0], plain[0])
        close(same[1], plain[1])
        groups[7] = 1
        block, two = model.blocks[0], torch.stack([c, other], 1)
        mixed, text = block(h, context, two, groups=groups)
        first, second = block(h, context, c), block(h, context, other)
        assert (mixed[:, 7] - first[0][:, 7]).abs().max() > 1e-2
        # Keys and values of token 7 changed too, so only its own modulation is compared: a block without attention.
        handle = block.attn.register_forward_hook(
            lambda module, args, out: tuple(torch.zeros_like(part) for part in out)
        )
        (mixed, text), first, second = (
            block(h, context, two, groups=groups),
            block(h, context, c),
            block(h, context, other),
        )
        handle.remove()
        close(mixed[:, 7], second[0][:, 7])
        close(mixed[:, :7], first[0][:, :7])
        close(text, first[1])
        assert (first[0] - second[0]).abs().amax((0, 2)).min() > 1e-2
        assert (first[1] - second[1]).abs().max() > 1e-2

    def test_hooks_skip_a_block_and_replace_a_part(self):
        model, inputs = small(), batch()
        handle = model.blocks[1].register_forward_hook(lambda block, args, out: args[:2])
        skipped = model(*inputs)
        handle.remove()
        shorter = copy.deepcopy(model)
        del shorter.blocks[1]
        assert torch.equal(skipped, shorter(*inputs))
        base = model(*inputs)
        for name in ("mlp", "context_mlp", "adaLN_modulation", "context_adaLN_modulation"):
            part = model.blocks[0].get_submodule(name)
            handle = part.register_forward_hook(lambda module, args, out: out * 0)
            assert (model(*inputs) - base).abs().max() > 1e-3, name
            handle.remove()

    def test_recorded_attention(self):
        model, inputs = small(), (*batch(), mask_of(2, 4, 3))
        base = model(*inputs)
        with record_attention(model) as weights:
            assert torch.equal(model(*inputs), base)
        assert list(weights) == [f"blocks.{i}.attn" for i in range(3)]
        assert weights["blocks.0.attn"][0].shape == (3, 2, 28, 28)
        assert weights["blocks.2.attn"][0].shape == (3, 2, 24, 28)
        assert (weights["blocks.1.attn"][0][0, :, :, 26:] == 0).all()


def test_with_its_text_encoder():
    model = TextMMDiT(
        text={"vocab_size": 9, "max_length": 6, "dim": 8, "num_heads": 2},
        mmdit={k: v for k, v in SMALL.items() if k != "context_dim"} | {"pooled_dim": 8},
    )
    randomised(model)
    x, t, _ = batch()
    tokens = torch.tensor([[1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 1], [0] * 6])
    out = model(x, t, tokens)
    states = model.encode_text(tokens)
    assert torch.equal(model.denoiser(x, t, *states), out)
    close(model(x[:1], t[:1], tokens[:1, :3]), out[:1])
    ids = model.denoiser.position_ids(4, 6)
    assert (model(x, t, tokens, position_ids=ids + 1) - out).abs().max() > 1e-3
    again = TextMMDiT(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x, t, tokens), out)


class TestBlock:
    @pytest.mark.parametrize("pre_only", [False, True])
    @pytest.mark.parametrize("dual", [False, True])
    def test_against_its_equations(self, pre_only, dual):
        block = randomised(MMDiTBlock(8, 2, context_pre_only=pre_only, dual_attention=dual)).double()
        g = torch.Generator().manual_seed(1)
        x, context, c = (torch.randn(2, *s, 8, generator=g, dtype=torch.float64) for s in ((5,), (3,), ()))

        def norm(a):
            return (a - a.mean(-1, keepdim=True)) / (a.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

        def mod(a, shift, scale):
            return norm(a) * (1 + scale) + shift

        m = block.adaLN_modulation(c)[:, None].split(8, -1)
        cm = block.context_adaLN_modulation(c)[:, None].split(8, -1)
        a, ca = block.attn(mod(x, m[0], m[1]), mod(context, cm[0], cm[1]))
        h = x + m[2] * a
        if dual:
            h = h + m[8] * block.attn2(mod(x, m[6], m[7]))
        h = h + m[5] * block.mlp(mod(h, m[3], m[4]))
        out, text = block(x, context, c)
        close(out, h, atol=1e-12)
        if pre_only:
            assert torch.equal(text, context)
        else:
            ch = context + cm[2] * ca
            close(text, ch + cm[5] * block.context_mlp(mod(ch, cm[3], cm[4])), atol=1e-12)


class TestConfig:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"positions": "sincos", "qk_norm": ""},
            {**CROPPED, "dual_attention_layers": (0, 1), "unused_context_query": True},
            {
                "attention": "naive",
                "pooled_dim": 6,
                "mlp_ratio": 2.5,
                "rope_theta": 50.0,
                "rope_axes_dims": [6, 2],
            },
        ],
    )
    def test_rebuilds(self, options):
        model = small(**options)
        extra = {"pooled": torch.randn(3, 6)} if options.get("pooled_dim") else {}
        out = model(*batch(), **extra)
        kept = {k: v for k, v in json.loads(json.dumps(model.config)).items() if v is not None}
        again = MMDiT(**kept)
        assert again.config == model.config
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(*batch(), **extra), out)

    def test_config_holds_every_argument(self):
        assert set(MMDiT(**SMALL).config) == set(inspect.signature(MMDiT).parameters)

    def test_copies_and_pickles(self):
        model = small()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(*batch()), model(*batch()))

    def test_cost_by_formula(self):
        """Multiply-accumulates at 16 x 16, patch 2, width 96, six blocks, 18 text tokens."""
        model = MMDiT(context_dim=64)
        macs = count_flops(model, torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, 18, 64)).macs
        d, n, text = 96, 64, 18
        full = (n + text) * 12 * d * d + 2 * (n + text) ** 2 * d + 12 * d * d
        last = n * 12 * d * d + text * 2 * d * d + 2 * n * (n + text) * d + 8 * d * d
        around = 2 * n * 12 * d + text * 64 * d + (256 + d) * d + 2 * d * d
        assert macs == 5 * full + last + around


class TestErrors:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"patch_size": 0}, "patch_size 0 must be positive"),
            ({"num_heads": 3}, "num_heads 3 divide hidden_size 16"),
            ({"positions": "learned"}, r"unknown positions 'learned': choose one of \['rope', 'sincos'"),
            ({"positions": "sincos_cropped"}, "needs pos_embed_max_size"),
            ({"hidden_size": 18, "num_heads": 1, "positions": "sincos"}, "multiple of 4, got 18"),
            ({"num_heads": 8}, "a head of width 2 cannot be shared by 2 axes"),
            ({"qk_norm": "layer_norm"}, "unknown qk_norm 'layer_norm'"),
            ({"dual_attention_layers": [3]}, r"dual_attention_layers \[3\] do not exist: there are 3 blocks"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            MMDiT(**{**SMALL, **options})

    def test_images(self):
        model = small()
        x, t, context = batch(size=(8, 7))
        with pytest.raises(
            ValueError, match=r"\(3, 8, 7\) given, this model takes 3 channels and sides that"
        ):
            model(x, t, context)
        with pytest.raises(ValueError, match=r"\(2, 8, 8\) given"):
            model(torch.zeros(3, 2, 8, 8), t, context)

    def test_text(self):
        model, (x, t, context) = small(), batch()
        with pytest.raises(ValueError, match="context of width 4 given, this model takes 5"):
            model(x, t, context[..., :4])
        with pytest.raises(ValueError, match="pooled text of width 6 given, this model takes None"):
            model(x, t, context, pooled=torch.zeros(3, 6))
        for pooled in (None, torch.zeros(3, 5)):
            with pytest.raises(ValueError, match="this model takes 6"):
                small(pooled_dim=6)(x, t, context, pooled=pooled)

    def test_positions(self):
        model = small()
        for positions in POSITIONS:
            with pytest.raises(ValueError, match="1 position ids given for 24 image tokens"):
                other = small(**{**CROPPED, "positions": positions})
                other(*batch(), position_ids=torch.zeros(1, 2, dtype=torch.long))
        with pytest.raises(ValueError, match="3 axes given, this embedding has 2"):
            model(*batch(), position_ids=torch.zeros(24, 3))
        with pytest.raises(ValueError, match="10 x 2 patches given, the position table has 9 x 9"):
            small(**CROPPED)(*batch(size=(20, 4)))
