"""A click at every wall hit: short decaying tones that begin exactly when the object touches the wall."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from minilib.data.bounce.balls import Balls, wall_hits

SAMPLE_RATE = 8_000
#: Pitch of each object's clicks in hertz, so that one can hear which one hit.
PITCHES = (880.0, 1320.0, 1980.0)
#: Seconds in which a click falls to 1 / e, and its loudness: two at once stay below 1.
DECAY = 0.015
AMPLITUDE = 0.45


def clicks(
    onsets: Float[Tensor, " m"],
    sample_rate: int = SAMPLE_RATE,
    duration: float | None = None,
    pitch: float | Float[Tensor, " m"] = PITCHES[0],
) -> Float[Tensor, " samples"]:
    """A mono waveform in [-1, 1]: ``exp(-(t - onset) / decay) sin(2 pi pitch (t - onset))`` from each onset on, added up.

    The tone is taken at the exact times of the samples, so an onset between two samples is not moved to one.

    Args:
        onsets: seconds.
        sample_rate: samples a second; at least twice the pitch.
        duration: seconds; what comes later is cut off. By default until the last click has died away.
        pitch: hertz, one for all or one each.

    Raises:
        ValueError: a negative onset or duration, or a pitch above half the sample rate.

    >>> clicks(torch.tensor([0.1]), 8000, 0.5).shape
    torch.Size([4000])
    """
    if duration is None:
        duration = (float(onsets.max()) if len(onsets) else 0.0) + 8 * DECAY
    index = torch.zeros(len(onsets), dtype=torch.long)
    return _mix(index, onsets, pitch, 1, sample_rate, duration)[0]


def soundtrack(balls: Balls, duration: float, sample_rate: int = SAMPLE_RATE) -> Float[Tensor, "n samples"]:
    """The clicks of each clip's hits, each object at its own pitch; arguments and errors as in :func:`clicks`."""
    hits = wall_hits(balls, duration)
    return _mix(hits.clip, hits.time, torch.tensor(PITCHES)[hits.ball], len(balls), sample_rate, duration)


def _mix(
    row: Tensor, onsets: Tensor, pitch: float | Tensor, rows: int, sample_rate: int, duration: float
) -> Tensor:
    """``rows`` waveforms; onset ``i`` sounds in ``row[i]``."""
    pitches = torch.as_tensor(pitch, dtype=torch.float64).expand(len(onsets))
    if duration < 0 or (onsets < 0).any():
        raise ValueError("onsets and duration are seconds from 0 on; got a negative one")
    if (2 * pitches > sample_rate).any():
        raise ValueError(
            f"a pitch of {float(pitches.max()):g} Hz needs more than {sample_rate} samples a second"
        )
    length = round(duration * sample_rate)
    window = round(8 * DECAY * sample_rate)
    onsets = onsets.double()
    sample = (onsets * sample_rate).ceil().long()[:, None] + torch.arange(window)
    since = sample.double() / sample_rate - onsets[:, None]
    tone = AMPLITUDE * torch.exp(-since / DECAY) * torch.sin(2 * torch.pi * pitches[:, None] * since)
    inside = (sample < length) & (since >= 0)
    out = torch.zeros(rows, length, dtype=torch.float64)
    out.index_put_((row[:, None].expand_as(sample)[inside], sample[inside]), tone[inside], accumulate=True)
    return out.clamp(-1.0, 1.0).float()
