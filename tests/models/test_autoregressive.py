import pytest
import torch

from minilib.models.autoregressive import AUTOREGRESSIVE_CONFIGS, AutoregressiveTransformer
from minilib.operators import OperatorTrace
from minilib.profiling import count_parameters


def tiny(**options):
    torch.manual_seed(0)
    config = {"vocab_size": 13, "hidden_size": 16, "depth": 3, "num_heads": 2, "max_length": 12}
    return AutoregressiveTransformer(**(config | options))


def some_tokens(batch=2, n=9):
    return torch.randint(13, (batch, n), generator=torch.Generator().manual_seed(1))


def by_hand(model, tokens):
    """The model written out with matrices, one sequence at a time, without a cache."""
    out = []
    for row in tokens:
        x = model.embedding.weight[row] + model.positions[: len(row)]
        for block in model.blocks:
            h = block.norm1(x)
            q, k, v = (h @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=-1)
            heads = []
            for i in range(model.config["num_heads"]):
                size = q.shape[-1] // model.config["num_heads"]
                part = slice(i * size, (i + 1) * size)
                logits = q[:, part] @ k[:, part].T / size**0.5
                logits = logits + torch.full_like(logits, -torch.inf).triu(1)
                heads.append(logits.softmax(-1) @ v[:, part])
            x = x + torch.cat(heads, -1) @ block.attn.proj.weight.T + block.attn.proj.bias
            h = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(x)), approximate="tanh")
            x = x + block.mlp.fc2(h)
        out.append(model.norm(x) @ model.head.weight.T)
    return torch.stack(out)


def test_the_forward_pass_is_the_one_written_out():
    model, tokens = tiny(), some_tokens()
    assert torch.allclose(model(tokens), by_hand(model, tokens), atol=1e-5)


@pytest.mark.parametrize("chunks", [(9,), (1,) * 9, (4, 1, 1, 3), (8, 1)])
def test_prefill_and_decoding_give_the_logits_of_the_whole(chunks):
    model, tokens = tiny(), some_tokens()
    whole, caches, end = model(tokens), model.make_caches(2), 0
    for size in chunks:
        part = tokens[:, end : end + size]
        end += size
        logits = model.decode(part[:, 0], caches) if size == 1 else model.prefill(part, caches)
        assert torch.allclose(logits, whole[:, end - 1], atol=1e-5)
    assert all(len(cache) == 9 for cache in caches)


def test_a_token_does_not_see_later_ones():
    model, tokens = tiny(), some_tokens(1)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 13
    same = (model(tokens) == model(changed)).all(-1)[0]
    assert same[:5].all() and not same[5:].any()


def test_order_matters():
    model = tiny()
    a, b = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[2, 1, 3]]))
    assert not torch.allclose(a[:, -1], b[:, -1], atol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
def test_generation_is_that_of_whole_passes(temperature):
    model, prompt = tiny(), some_tokens(2, 3)
    found = model.generate(prompt, 9, generator=torch.Generator().manual_seed(5), temperature=temperature)
    slow, g = prompt, torch.Generator().manual_seed(5)
    while slow.shape[1] < 9:
        logits = model(slow)[:, -1]
        if temperature:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=g)
        else:
            new = logits.argmax(-1, keepdim=True)
        slow = torch.cat([slow, new], 1)
    assert torch.equal(found, slow) and torch.equal(found[:, :3], prompt)


def test_nothing_to_generate():
    model, prompt = tiny(), some_tokens(2, 3)
    assert torch.equal(model.generate(prompt, 3, generator=torch.Generator()), prompt)


def test_lengths_of_generation_are_a_ramp():
    model = tiny(depth=1)
    with OperatorTrace() as trace:
        model.generate(torch.zeros(1, 1, dtype=torch.long), 9, generator=torch.Generator().manual_seed(0))
    assert trace.lengths == [(1, keys) for keys in range(1, 9)]


def test_gradients_reach_every_parameter():
    model = tiny()
    model(some_tokens()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_config_rebuilds_the_model():
    model = tiny(mlp_ratio=2.0)
    again = AutoregressiveTransformer(**model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(some_tokens()), model(some_tokens()))


@pytest.mark.parametrize("name, millions", [("B", 111), ("L", 343), ("XL", 775)])
def test_sizes_are_the_published_ones_but_for_the_feed_forward_network(name, millions):
    with torch.device("meta"):
        model = AutoregressiveTransformer(**AUTOREGRESSIVE_CONFIGS[f"LlamaGen-{name}"])
    # LlamaGen has a gated feed-forward network of width 8 d / 3, rounded up to a multiple of 256, and 1,000 classes.
    d = model.config["hidden_size"]
    gated = 3 * d * (-(-(8 * d // 3) // 256) * 256)
    theirs = count_parameters(model) + model.config["depth"] * (gated - 8 * d * d) + 1000 * d
    assert theirs / 1e6 == pytest.approx(millions, abs=1.0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tiny(depth=0), "have to be positive"),
        (lambda: tiny(num_heads=3), "3 heads do not divide the width 16"),
        (lambda: tiny()(some_tokens(1, 13)), "a sequence of 13 tokens given"),
        (lambda: tiny().prefill(some_tokens(), tiny(depth=2).make_caches(2)), "2 caches given"),
        (lambda: tiny().generate(some_tokens(1, 5), 4, generator=torch.Generator()), "a prompt of 1 to 4"),
        (lambda: tiny().generate(some_tokens(1, 0), 4, generator=torch.Generator()), "a prompt of 1 to 4"),
        (
            lambda: tiny().generate(some_tokens(1, 1), 4, generator=torch.Generator(), temperature=-1.0),
            "temperature",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
