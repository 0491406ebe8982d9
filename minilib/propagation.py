"""Encoder propagation: the encoder of a U-Net runs in key steps only, its decoder in every step (Faster Diffusion).

Li et al. 2024 (arXiv 2312.09608; hutaiHang/Faster-Diffusion, ``utils_sd.py``). A key step runs the whole network and keeps what
the decoder reads of the image: all skips, and the result of the middle. The steps up to the next key step run the decoder alone,
on what was kept, each with its own time. They do not look at the image of their step, so they do not wait for each other: all
can run as one batch, before the sampler takes the first of them. The number of decoder calls *in a row* falls from the number of
steps to the number of key steps; the number of operations stays the same.

Rows of such a batch lie ``(half step image)``: with guidance, first one half of the texts for all steps, then the other. So the
two halves are still the two halves of the batch. Steps count from 0, the noisiest one.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Num, Shaped
from torch import Tensor

from minilib.models import UNet


class Encoded(NamedTuple):
    """All that the decoder reads of the image: the result of the middle, and the skips in the order of the down units."""

    h: Tensor
    skips: list[Tensor]


def key_groups(steps: int, keys: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """The steps in groups: each key step, and the steps that live on what it kept.

    Args:
        steps: of the sampler.
        keys: the key steps, in any order; step 0 has to be one.

    Raises:
        ValueError: no step 0, a step twice, or one outside the sampler.

    >>> key_groups(6, (0, 1, 4))
    ((0,), (1, 2, 3), (4, 5))
    """
    chosen = sorted(keys)
    if len(set(chosen)) != len(chosen) or not all(0 <= key < steps for key in chosen):
        raise ValueError(f"key steps must be different steps from 0 to {steps - 1}; got {chosen}")
    if not chosen or chosen[0] != 0:
        raise ValueError(f"step 0 has to be a key step: nothing is kept before it; got {chosen}")
    ends = [*chosen[1:], steps]
    return tuple(tuple(range(key, end)) for key, end in zip(chosen, ends, strict=True))


def mirrored_keys(steps: int, keys: Iterable[int]) -> tuple[int, ...]:
    """The key steps with the lengths of their groups in reverse: dense late where ``keys`` are dense early.

    Raises:
        ValueError: as ``key_groups``.

    >>> mirrored_keys(10, (0, 1, 2, 6))
    (0, 4, 8, 9)
    """
    lengths = [len(group) for group in key_groups(steps, keys)]
    return tuple(sum(lengths[i:]) for i in range(len(lengths), 0, -1))


def repeat_for_steps(x: Shaped[Tensor, "..."], k: int, halves: int = 1) -> Shaped[Tensor, "..."]:
    """Rows of a batch for k steps at once: ``(half image) -> (half step image)``.

    Raises:
        ValueError: ``k`` below 1, or a batch that has no such halves.

    >>> repeat_for_steps(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2, halves=2).tolist()
    [1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0]
    """
    _check_rows(len(x), k, halves)
    return repeat(x, "(half b) ... -> (half k b) ...", half=halves, k=k)


def split_steps(x: Shaped[Tensor, "..."], k: int, halves: int = 1) -> Shaped[Tensor, "..."]:
    """Back to one batch a step: ``(half step image) -> step, (half image)``.

    Raises:
        ValueError: ``k`` below 1, or a batch that is not of k steps and so many halves.

    >>> split_steps(torch.tensor([1.0, 2.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0]), 2, halves=2).tolist()
    [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]
    """
    _check_rows(len(x), k, halves * k)
    return rearrange(x, "(half k b) ... -> k (half b) ...", half=halves, k=k)


def encode_key(
    unet: UNet,
    x: Float[Tensor, "b c h w"],
    t: Num[Tensor, " b"],
    context: Float[Tensor, "b l d_text"] | None = None,
    context_mask: Bool[Tensor, "b l"] | None = None,
    pooled: Float[Tensor, "b d_pooled"] | None = None,
) -> Encoded:
    """The encoder and the middle of a key step: all that the following steps will know of the image.

    Raises:
        ValueError: channels or text that do not fit the network.
    """
    emb = unet.embed(t, pooled)
    h, skips = unet.encode(x, emb, context, context_mask)
    return Encoded(unet.middle(h, emb, context, context_mask), skips)


def decode_steps(
    unet: UNet,
    kept: Encoded,
    times: Num[Tensor, " k"],
    context: Float[Tensor, "b l d_text"] | None = None,
    context_mask: Bool[Tensor, "b l"] | None = None,
    pooled: Float[Tensor, "b d_pooled"] | None = None,
    *,
    halves: int = 1,
    at_once: int | None = None,
) -> Float[Tensor, "k b c h w"]:
    """The predictions of k steps from what one key step kept.

    Args:
        unet: of ``kept``; only its time embedding, decoder and output layers run.
        kept: as ``encode_key`` gives it, for b rows.
        times: of the k steps; the image of none of these steps is needed.
        context: text states of the same rows.
        context_mask: True for a real token.
        pooled: pooled text of the same rows.
        halves: 2 if the rows are the two halves of guidance, which then stay the halves of the repeated batch.
        at_once: steps in one call of the decoder: None: all; 1: one after another, with the least memory.

    Raises:
        ValueError: no times, rows without such halves, ``at_once`` below 1, text that does not fit.
    """
    if len(times) == 0 or (at_once is not None and at_once < 1):
        raise ValueError(f"need times and at_once of at least 1; got {len(times)} times, at_once={at_once}")
    done = []
    for part in times.split(at_once or len(times)):
        k = len(part)
        h, *skips = (repeat_for_steps(f, k, halves) for f in (kept.h, *kept.skips))
        text = [
            None if f is None else repeat_for_steps(f, k, halves) for f in (context, context_mask, pooled)
        ]
        rows = len(kept.h) // halves
        emb = unet.embed(repeat(part, "k -> (half k b)", half=halves, b=rows), text[2])
        done.append(split_steps(unet.decode(h, skips, emb, *text[:2]), k, halves))
    return torch.cat(done)


class EncoderPropagation:
    """A denoiser that encodes in key steps only, to be handed to ``minilib.sampling.sample``. One use is one sampling.

    At a key step it encodes and decodes all steps of the group, ``at_once`` of them in one call; in the steps after it hands
    the finished predictions out, whatever the image is by then. Every solver that asks once a step will do. A solver that scales
    its input is asked about the scaled one, as usual.

    Args:
        unet: the network itself (``TextUNet.denoiser``).
        keys: the key steps, step 0 among them.
        timesteps: of the solver, after its ``set_timesteps``: the times of steps that are still to come are needed.
        context: text states, b rows; with guidance 2b, the wanted texts first.
        context_mask: True for a real token; as many rows.
        pooled: as many rows.
        guidance_scale: None: no guidance, one half. A number: two halves in one batch.
        at_once: steps in one call of the decoder; None: the whole group. 1 is sequential decoding.

    Attributes:
        encoder_calls: so far.
        decoder_calls: so far, in a row.

    Raises:
        ValueError: keys that ``key_groups`` refuses, no timesteps, ``at_once`` below 1, an odd number of text rows with guidance.

    >>> unet = UNet(cross_attention_dim=24)
    >>> times = torch.tensor([999, 749, 499, 249])
    >>> model = EncoderPropagation(unet, (0, 1), times, torch.zeros(2, 5, 24))
    >>> x = torch.zeros(2, 3, 16, 16)
    >>> [model(x, t.expand(2)).shape for t in times][0], model.encoder_calls, model.decoder_calls
    (torch.Size([2, 3, 16, 16]), 2, 2)
    """

    def __init__(
        self,
        unet: UNet,
        keys: Iterable[int],
        timesteps: Num[Tensor, " steps"],
        context: Float[Tensor, "rows l d_text"] | None = None,
        context_mask: Bool[Tensor, "rows l"] | None = None,
        pooled: Float[Tensor, "rows d_pooled"] | None = None,
        *,
        guidance_scale: float | None = None,
        at_once: int | None = None,
    ) -> None:
        self.groups = {group[0]: group for group in key_groups(len(timesteps), keys)}
        self.halves = 1 if guidance_scale is None else 2
        if context is not None and len(context) % self.halves:
            raise ValueError(
                f"guidance needs texts in two halves, wanted then unwanted; got {len(context)} rows"
            )
        if at_once is not None and at_once < 1:
            raise ValueError(f"at_once must be at least 1, or None for the whole group; got {at_once}")
        self.unet, self.timesteps, self.guidance_scale, self.at_once = (
            unet,
            timesteps,
            guidance_scale,
            at_once,
        )
        self.text = (context, context_mask, pooled)
        self.encoder_calls = self.decoder_calls = self._step = 0
        self._ready: list[Tensor] = []

    def __call__(self, x: Float[Tensor, "b c h w"], t: Num[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """The prediction of the next step; ``x`` is read in key steps only.

        Raises:
            ValueError: a time that is not the next one of ``timesteps``, or rows that do not fit the text.
            RuntimeError: all steps have been asked for.
        """
        if self._step >= len(self.timesteps):
            raise RuntimeError(
                f"all {self._step} steps are done: make a new EncoderPropagation to sample again"
            )
        expected = float(self.timesteps[self._step])
        if abs(float(t[0]) - expected) > 1e-4 * max(1.0, expected):
            raise ValueError(
                f"step {self._step} is at t = {expected:g}, got t = {float(t[0]):g}: give the timesteps of the solver "
                "that samples, after its set_timesteps"
            )
        context = self.text[0]
        if context is not None and len(context) != self.halves * len(x):
            raise ValueError(f"{len(x)} images need {self.halves * len(x)} rows of text; got {len(context)}")
        if self._step in self.groups:
            self._ready = self._predict(x, self.groups[self._step])
        self._step += 1
        return self._ready.pop(0)

    def _predict(self, x: Tensor, group: Sequence[int]) -> list[Tensor]:
        times = self.timesteps[list(group)].to(x.device)
        rows = torch.cat([x] * self.halves)
        kept = encode_key(self.unet, rows, times[:1].expand(len(rows)), *self.text)
        out = decode_steps(self.unet, kept, times, *self.text, halves=self.halves, at_once=self.at_once)
        self.encoder_calls += 1
        self.decoder_calls += -(-len(group) // (self.at_once or len(group)))
        if self.guidance_scale is not None:
            wanted, unwanted = out.chunk(2, dim=1)
            out = unwanted + self.guidance_scale * (wanted - unwanted)
        return list(out)


def _check_rows(rows: int, k: int, parts: int) -> None:
    if k < 1 or parts < 1 or rows % parts:
        raise ValueError(
            f"a batch of {rows} rows given for {k} steps: it must have {max(parts, 1)} equal parts"
        )
