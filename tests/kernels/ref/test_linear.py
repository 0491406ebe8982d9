import pytest
import torch
import torch.nn.functional as F
from kernel_checks import relative_error, values_and_gradients
from torch.utils.flop_counter import FlopCounterMode

from minilib.kernels import explain, linear, linear_attention

SIZES = [
    (2, 3, 5, 7, 4, 6),
    (1, 1, 1, 1, 1, 1),
    (0, 2, 3, 3, 4, 4),
    (2, 1, 0, 3, 4, 4),
    (1, 2, 40, 33, 16, 16),
]
OPTIONS = [
    {"feature": feature, "normalise": normalise} for feature in ("relu", "elu") for normalise in (True, False)
]


def inputs(sizes, dtype=torch.float64, seed=0):
    b, h, n, m, d, e = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, h, n, d), (b, h, m, d), (b, h, m, e))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def sum_over_keys(q, k, v, *, feature, normalise, eps):
    """The paper's sums, one query at a time (Katharopoulos et al., equation 3)."""
    phi = {"relu": lambda x: x.clamp_min(0), "elu": lambda x: torch.where(x > 0, x + 1, x.exp())}[feature]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for i in range(q.shape[2]):
        top, bottom = 0, eps * k.shape[2]
        for j in range(k.shape[2]):
            similarity = (phi(q[:, :, i]) * phi(k[:, :, j])).sum(-1, keepdim=True)
            top, bottom = top + similarity * v[:, :, j], bottom + similarity
        out[:, :, i] = top / bottom if normalise else top
    return out


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES[:4])
def test_the_definition_is_the_sum_over_keys(sizes, options):
    q, k, v = inputs(sizes)
    expected = sum_over_keys(q, k, v, **options, eps=1e-3)
    torch.testing.assert_close(
        linear.linear_attention_reference(q, k, v, **options, eps=1e-3), expected, rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    "dtype, bound",
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)],
)
def test_two_products_are_the_explicit_matrix(sizes, options, dtype, bound):
    q, k, v = inputs(sizes, dtype)

    def out_and_gradients(function, tensors, weights=None):
        return values_and_gradients(lambda *t: function(*t, **options), tensors, weights)

    out, grads, weights = out_and_gradients(linear_attention, (q, k, v))
    doubles = [t.double() for t in (q, k, v)]
    expected, wanted, _ = out_and_gradients(linear.linear_attention_reference, doubles, weights)
    for a, b in zip((*out, *grads), (*expected, *wanted), strict=True):
        # With one key the normalised output does not depend on q and k: nothing to be relative to.
        error = min(relative_error(a, b), float((a.detach().double() - b.detach()).norm()))
        assert a.dtype == dtype and error <= bound


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_the_definition(options):
    tensors = [t.requires_grad_() for t in inputs((1, 2, 3, 4, 3, 2))]
    assert torch.autograd.gradcheck(
        lambda *t: linear.linear_attention_reference(*t, **options), tensors, atol=1e-8
    )


def test_the_official_linfusion_formula():
    """Huage001/LinFusion, src/linfusion/attention.py: a mean over the keys below, N^-1/2 on each factor above."""
    q, k, v = inputs((2, 3, 9, 9, 4, 4))
    features = [F.elu(t) + 1.0 for t in (q, k)]
    z = features[0] @ features[1].mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-4
    expected = features[0] @ ((features[1].transpose(-2, -1) * 9**-0.5) @ (v * 9**-0.5)) / z
    torch.testing.assert_close(linear_attention(q, k, v, feature="elu"), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("feature", ["relu", "elu"])
@pytest.mark.parametrize("path", ["reference", "cpu"])
def test_repeating_all_tokens_changes_nothing_if_normalised_and_else_scales(feature, path):
    q, k, v = inputs((2, 2, 6, 6, 4, 4))
    run = linear.LINEAR_ATTENTION.paths[path]
    for repeats in (2, 3):
        keys, values = (t.repeat(1, 1, repeats, 1) for t in (k, v))
        assert relative_error(run(q, keys, values, feature=feature), run(q, k, v, feature=feature)) < 1e-14
        free = {"feature": feature, "normalise": False}
        assert relative_error(run(q, keys, values, **free), repeats * run(q, k, v, **free)) < 1e-14


def test_the_order_of_the_keys_does_not_matter_and_weights_sum_to_one():
    q, k, v = inputs((1, 2, 5, 8, 4, 4))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        linear_attention(q, k[:, :, order], v[:, :, order]), linear_attention(q, k, v), rtol=1e-12, atol=1e-14
    )
    ones = linear_attention(q, k, torch.ones_like(v), feature="elu", eps=0.0)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_query_without_features_gives_zero_and_finite_gradients(dtype):
    q, k, v = inputs((1, 1, 4, 4, 8, 8), dtype)
    q[:, :, 1] = -1
    out, grads, _ = values_and_gradients(linear_attention, (q, k, v))
    assert torch.equal(out[0][:, :, 1], torch.zeros_like(out[0][:, :, 1]))
    assert all(g.isfinite().all() for g in grads)


def test_float16_does_not_overflow_at_many_tokens():
    q, k, v = (20 * t.abs() for t in inputs((1, 1, 2, 4096, 4, 4), torch.float16))
    assert (k.double().transpose(-1, -2) @ v.double()).max() > 65504  # the sum would
    expected = linear.linear_attention_reference(q.double(), k.double(), v.double())
    assert relative_error(linear_attention(q, k, v), expected) < 1e-2


@pytest.mark.parametrize("normalise", [True, False])
def test_flops_of_the_formula_and_the_counter(normalise):
    b, h, n, m, d, e = 8, 16, 1024, 512, 72, 64
    q, k, v = (torch.empty(shape, device="meta") for shape in ((b, h, n, d), (b, h, m, d), (b, h, m, e)))
    with FlopCounterMode(display=False) as counter:
        linear_attention(q, k, v, normalise=normalise)
    assert counter.get_total_flops() == linear.linear_attention_flops(b, h, n, m, d, e, normalise)


def test_the_explicit_matrix_costs_what_its_size_says():
    q, k, v = (torch.empty(2, 3, 64, 8, device="meta") for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        linear.linear_attention_reference(q, k, v)
    assert counter.get_total_flops() == 4 * 2 * 3 * 64 * 64 * 8


def test_the_modes(monkeypatch):
    q, k, v = inputs((1, 1, 3, 3, 4, 4), torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert explain("linear_attention", q, k, v, feature="elu").path == "cpu"
    monkeypatch.setenv("MINILIB_KERNELS", "ref")
    assert torch.equal(linear_attention(q, k, v), linear.linear_attention_reference(q, k, v))
    monkeypatch.setenv("MINILIB_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="linear_attention cannot run in Triton"):
        linear_attention(q, k, v)
    assert "different dtypes" in linear.LINEAR_ATTENTION.available(q.half(), k, v)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"feature": "gelu"}, "unknown feature 'gelu'.*elu.*relu"),
        ({"q": torch.zeros(2, 3, 4)}, "batch, heads, tokens, width"),
        ({"q": torch.zeros(1, 1, 3, 5)}, "do not fit"),
        ({"v": torch.zeros(1, 1, 2, 4)}, "do not fit"),
        ({"k": torch.zeros(1, 1, 0, 4), "v": torch.zeros(1, 1, 0, 4)}, "no keys"),
    ],
)
def test_wrong_arguments_are_named(change, said):
    arguments = dict.fromkeys("qkv", torch.zeros(1, 1, 3, 4)) | {"feature": "relu"} | change
    with pytest.raises(ValueError, match=said):
        linear.check_shapes(**arguments)
