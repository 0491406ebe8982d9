"""What each kind of operator costs in a U-Net, a DiT, an autoregressive transformer and a video block, by formula.

The integers that ``minilib.operators`` counts, at any size and without a model; conventions and letters as in
``minilib.costs`` (one multiply-add is two operations). The sequence lengths of every attention call come with them, and
with these the bytes of the score matrices, as in Golden et al. 2023 (arXiv 2312.14385).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from .costs import attention_flops, dit_flops, linear_flops, spatial_transformer_flops, transformer_flops


class OperatorFlops(NamedTuple):
    """FLOPs of the three kinds that do matrix arithmetic."""

    attention: int = 0
    convolution: int = 0
    linear: int = 0

    @property
    def total(self) -> int:
        """Of all three."""
        return self.attention + self.convolution + self.linear

    def share(self, kind: str) -> float:
        """A kind's part of the total.

        >>> OperatorFlops(1, 0, 3).share("linear")
        0.75
        """
        if kind not in self._fields:
            raise ValueError(f"unknown kind {kind!r}: choose one of {self._fields}")
        return getattr(self, kind) / self.total

    def plus(self, other: "OperatorFlops") -> "OperatorFlops":
        """The sum, kind by kind."""
        return OperatorFlops(*(a + b for a, b in zip(self, other, strict=True)))


class AttentionCall(NamedTuple):
    """The shape of one attention: queries (batch, heads, queries, head_dim), and as many ``keys``."""

    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int

    @property
    def flops(self) -> int:
        """Of both products."""
        return attention_flops(*self)


def score_matrix_bytes(calls: Iterable[AttentionCall], *, itemsize: int = 4) -> int:
    """Bytes of the queries x keys matrices of all ``calls``, one for each head: what a fused kernel never makes.

    >>> score_matrix_bytes([AttentionCall(1, 2, 10, 20, 8)])
    1600
    """
    return itemsize * sum(call.batch * call.heads * call.queries * call.keys for call in calls)


def unet_attention_calls(
    config: Mapping[str, Any], height: int, width: int, text_tokens: int = 0, *, batch: int = 1
) -> list[AttentionCall]:
    """Every attention of one forward pass of ``UNet(**config)``, in order; self and cross in turn where there is text.

    Args:
        config: options of ``minilib.models.UNet``.
        height: of the input in pixels, or in latent pixels.
        width: likewise.
        text_tokens: l, the keys of the cross-attention.
        batch: images.

    Raises:
        ValueError: unknown options, sides that patches do not tile, or text for a model that reads none (and the reverse).

    >>> from minilib.models.unet_configs import UNET_CONFIGS
    >>> [call.queries for call in unet_attention_calls(UNET_CONFIGS["SD 1.5"], 64, 64, 77)][::2]
    [4096, 4096, 1024, 1024, 256, 256, 64, 256, 256, 256, 1024, 1024, 1024, 4096, 4096, 4096]
    """
    c = _unet(config, height, width, text_tokens)
    calls = []
    for part in _unet_parts(c, height, width):
        if part.kind != "transformer":
            continue
        heads = _at(c["num_heads"], part.level)
        size, n = part.out // heads, part.height * part.width
        own = AttentionCall(batch, heads, n, n, size)
        both = [own, own._replace(keys=text_tokens)] if c["cross_attention_dim"] else [own]
        calls += both * _at(c["transformer_layers"], part.level)
    return calls


def unet_operator_flops(
    config: Mapping[str, Any], height: int, width: int, text_tokens: int = 0, *, batch: int = 1
) -> OperatorFlops:
    """One forward pass of ``UNet(**config)`` by kind; arguments and errors as in ``unet_attention_calls``."""
    c = _unet(config, height, width, text_tokens)
    attention = sum(
        call.flops for call in unet_attention_calls(config, height, width, text_tokens, batch=batch)
    )
    first, text = c["block_out_channels"][0], c["cross_attention_dim"]
    emb = 4 * first
    convolution, linear = 0, linear_flops(batch, first, emb) + linear_flops(batch, emb, emb)
    if c["pooled_dim"]:
        linear += linear_flops(batch, c["pooled_dim"], emb) + linear_flops(batch, emb, emb)
    for part in _unet_parts(c, height, width):
        rows = batch * part.height * part.width
        if part.kind == "transformer":
            depth = _at(c["transformer_layers"], part.level)
            whole = spatial_transformer_flops(batch, rows // batch, part.out, text_tokens, text, depth=depth)
            own = attention_flops(batch, 1, rows // batch, rows // batch, part.out)
            cross = attention_flops(batch, 1, rows // batch, text_tokens, part.out)
            linear += whole - depth * (own + cross)
        else:
            convolution += sum(linear_flops(rows, size, part.out) for size in part.reads)
            linear += linear_flops(batch, emb, part.out) if part.kind == "resnet" else 0
    return OperatorFlops(attention, convolution, linear)


def unet_convolution_bytes(
    config: Mapping[str, Any], height: int, width: int, *, batch: int = 1, itemsize: int = 4
) -> int:
    """Bytes of the outputs of all convolutions of one forward pass of ``UNet(**config)``."""
    c = _unet(config, height, width, None)
    values = sum(
        len(part.reads) * part.out * part.height * part.width for part in _unet_parts(c, height, width)
    )
    return batch * itemsize * values


def dit_operator_flops(config: Mapping[str, Any], *, batch: int = 1) -> OperatorFlops:
    """One forward pass of ``DiT(**config)`` by kind: there is no convolution, patches are embedded by a linear layer.

    Raises:
        ValueError: as ``minilib.costs.dit_flops``.
    """
    whole, n = dit_flops(config, batch=batch), (config["input_size"] // config["patch_size"]) ** 2
    attention = config["depth"] * attention_flops(batch, 1, n, n, config["hidden_size"])
    return OperatorFlops(attention, 0, whole - attention)


def autoregressive_flops(
    config: Mapping[str, Any], queries: int, keys: int | None = None, *, batch: int = 1, logits: int = 1
) -> OperatorFlops:
    """A pass of ``AutoregressiveTransformer(**config)`` over so many new tokens, with ``keys`` tokens so far (these included).

    Args:
        config: options of the model.
        queries: new tokens: all of them in prefill, 1 in decoding.
        keys: None: as many as queries.
        batch: sequences.
        logits: tokens whose logits are made: 1 in prefill and decoding, all in training.

    Raises:
        ValueError: fewer keys than queries.
    """
    keys = queries if keys is None else keys
    if not 1 <= queries <= keys:
        raise ValueError(f"need 1 <= queries <= keys: the new tokens are keys too; got {queries} and {keys}")
    d, depth, ratio = config["hidden_size"], config["depth"], config.get("mlp_ratio", 4.0)
    attention = depth * attention_flops(batch, 1, queries, keys, d)
    own = attention_flops(batch, 1, queries, queries, d)
    linear = depth * (transformer_flops(batch, queries, d, mlp_ratio=ratio) - own)
    return OperatorFlops(attention, 0, linear + linear_flops(batch * logits, d, config["vocab_size"]))


def factorised_block_flops(
    b: int, frames: int, places: int, d: int, *, mlp_ratio: float = 4.0
) -> OperatorFlops:
    """A ``FactorisedBlock``: spatial and temporal attention, four projections each, and the feed-forward network.

    >>> factorised_block_flops(1, 4, 16, 8).attention == spatial_flops(1, 4, 16, 8) + temporal_flops(1, 4, 16, 8)
    True
    """
    rows, hidden = b * frames * places, int(d * mlp_ratio)
    linear = 2 * linear_flops(rows, d, 4 * d) + linear_flops(rows, d, hidden) + linear_flops(rows, hidden, d)
    both = spatial_flops(b, frames, places, d) + temporal_flops(b, frames, places, d)
    return OperatorFlops(both, 0, linear)


def spatial_flops(b: int, frames: int, places: int, d: int) -> int:
    """Attention inside each frame: as many sequences as frames, each as long as a frame has places."""
    return attention_flops(b * frames, 1, places, places, d)


def temporal_flops(b: int, frames: int, places: int, d: int) -> int:
    """Attention over the frames at each place: as many sequences as places, each as long as there are frames."""
    return attention_flops(b * places, 1, frames, frames, d)


class _Part(NamedTuple):
    """A piece of a U-Net: what its convolutions read (channels, times 9 for a 3x3 kernel), and the map that they write."""

    kind: str
    level: int
    out: int
    height: int
    width: int
    reads: tuple[int, ...] = ()


def _unet_parts(c: Mapping[str, Any], height: int, width: int) -> Iterator[_Part]:
    """The pieces in the order in which they run."""
    widths, layers, patch = c["block_out_channels"], c["layers_per_block"], c["patch_size"] ** 2
    sides = [(height // c["patch_size"], width // c["patch_size"])]
    for _ in widths[1:]:
        sides.append(tuple((side + 1) // 2 for side in sides[-1]))
    last = len(widths) - 1

    def layer(entering: int, level: int, *, attends: bool) -> Iterator[_Part]:
        out = widths[level]
        shortcut = (entering,) if entering != out else ()
        yield _Part("resnet", level, out, *sides[level], (9 * entering, 9 * out, *shortcut))
        if attends:
            yield _Part("transformer", level, out, *sides[level])

    yield _Part("convolution", 0, widths[0], *sides[0], (9 * c["in_channels"] * patch,))
    skips = [widths[0]]
    for level, out in enumerate(widths):
        for _ in range(layers):
            yield from layer(skips[-1], level, attends=level in c["attention_levels"])
            skips.append(out)
        if level < last:
            yield _Part("convolution", level, out, *sides[level + 1], (9 * out,))
            skips.append(out)
    yield from layer(widths[last], last, attends=True)
    yield from layer(widths[last], last, attends=False)
    main = widths[last]
    for level in reversed(range(last + 1)):
        for _ in range(layers + 1):
            yield from layer(main + skips.pop(), level, attends=level in c["attention_levels"])
            main = widths[level]
        if level:
            yield _Part("convolution", level, main, *sides[level - 1], (9 * main,))
    yield _Part("convolution", 0, c["out_channels"] * patch, *sides[0], (9 * widths[0],))


def _at(value: Any, level: int) -> int:
    return value if isinstance(value, int) else value[level]


def _unet(config: Mapping[str, Any], height: int, width: int, text_tokens: int | None) -> dict[str, Any]:
    """``config`` with the model's defaults, after the checks; ``text_tokens`` None: not looked at."""
    import inspect

    from .models import UNet

    defaults = {k: p.default for k, p in inspect.signature(UNet).parameters.items()}
    unknown = sorted(set(config) - set(defaults))
    if unknown:
        raise ValueError(f"unknown options {unknown}: UNet has {sorted(defaults)}")
    c = defaults | dict(config)
    if height < 1 or width < 1 or height % c["patch_size"] or width % c["patch_size"]:
        raise ValueError(f"an input of {height} x {width} given: patches of {c['patch_size']} do not tile it")
    if text_tokens is not None and bool(text_tokens) != bool(c["cross_attention_dim"]):
        reads = "reads text" if c["cross_attention_dim"] else "reads no text"
        raise ValueError(f"{text_tokens} text tokens given, but this U-Net {reads}")
    return c
