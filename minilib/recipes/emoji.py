"""``mmdit_emoji``: a text-to-image MM-DiT on real pictures with real captions, read by a real sentence encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minilib.data import load
from minilib.data.emoji import STYLES, CaptionedImageSet
from minilib.data.text_states import CaptionStates, caption_states
from minilib.recipes.base import (
    Cycle,
    Recipe,
    flow_matching,
    image_set_line,
    logit_normal_times,
    rows_png,
    training_run,
)
from minilib.training import Batch, FitConfig, MakeBatch

ENCODER = "minilm"
SIZE = 32
#: One cycle draws the right colours in the right places, but few drawings can be told from others of their kind.
SECOND = Cycle(14 / 12, {"warmup": 100, "decay_fraction": 0.8, "seed": 1})


def style_vectors(style: Int[Tensor, " n"]) -> Float[Tensor, "n 3"]:
    """The pooled condition: which design team draws. All zeros stands for nobody in particular."""
    return F.one_hot(style, len(STYLES)).float()


def conditions(
    states: CaptionStates, concept: Int[Tensor, " n"], style: Int[Tensor, " n"]
) -> dict[str, Tensor]:
    """What ``mmdit_emoji`` reads: states and mask of the captions, and the style as the pooled vector."""
    context, mask = states.of(concept)
    return {"context": context, "context_mask": mask, "pooled": style_vectors(style)}


def null_conditions(states: CaptionStates) -> dict[str, Tensor]:
    """The empty caption in no style, one row: what guidance moves away from."""
    return {"context": states.null, "context_mask": states.null_mask, "pooled": torch.zeros(1, len(STYLES))}


def emoji_batches(
    data: CaptionedImageSet, states: CaptionStates, times: Callable[[int, torch.Generator], Tensor]
) -> MakeBatch:
    """Batches of pictures with the states of their captions: ``x0, context, context_mask, pooled, noise, t``.

    A tenth of the captions is dropped and, on its own, a tenth of the styles.
    """

    def make_batch(generator: torch.Generator, n: int) -> Batch:
        pick = torch.randint(len(data), (n,), generator=generator)
        given = conditions(states, data.concept[pick], data.style[pick])
        no_caption, no_style = torch.rand(2, n, generator=generator) < 0.1
        context = torch.where(no_caption[:, None, None], states.null, given["context"])
        mask = torch.where(no_caption[:, None], states.null_mask, given["context_mask"])
        pooled = given["pooled"].masked_fill(no_style[:, None], 0.0)
        noise = torch.randn(n, *data.x.shape[1:], generator=generator)
        return {
            "x0": data.x[pick],
            "context": context,
            "context_mask": mask,
            "pooled": pooled,
            "noise": noise,
            "t": times(n, generator),
        }

    return make_batch


def _build() -> nn.Module:
    from minilib.models import MMDiT

    return MMDiT(
        sample_size=SIZE,
        patch_size=4,
        hidden_size=128,
        depth=6,
        num_heads=4,
        context_dim=caption_states(ENCODER, "train").states.shape[2],
        pooled_dim=len(STYLES),
        rope_theta=100.0,
    )


def _batches() -> MakeBatch:
    return emoji_batches(load("emoji", "train", SIZE), caption_states(ENCODER, "train"), logit_normal_times())


@torch.no_grad()
def draw_emoji(
    model: nn.Module,
    states: CaptionStates,
    concept: Int[Tensor, " n"],
    style: Int[Tensor, " n"],
    *,
    guidance_scale: float = 3.0,
    steps: int = 25,
    seed: int = 0,
    batch: int = 128,
) -> Float[Tensor, "n 3 32 32"]:
    """Pictures of captions in the style of a design team, in [-1, 1], by Euler's method.

    Picture ``i`` starts from the same noise whatever the batch.
    """
    from minilib.guidance import classifier_free_guidance
    from minilib.sampling import initial_noise, sample_final
    from minilib.schedulers import FlowMatchEulerDiscreteScheduler

    noise = initial_noise((len(concept), 3, SIZE, SIZE), torch.Generator().manual_seed(seed))
    done = []
    for c, s, x in zip(concept.split(batch), style.split(batch), noise.split(batch), strict=True):
        guided = classifier_free_guidance(
            model,
            cond=conditions(states, c, s),
            null=null_conditions(states),
            guidance_scale=guidance_scale,
        )
        done.append(sample_final(guided, FlowMatchEulerDiscreteScheduler(), x, num_inference_steps=steps))
    return torch.cat(done).clamp(-1, 1)


def recognised(
    nearest: Int[Tensor, " n"], concept: Int[Tensor, " n"], style: Int[Tensor, " n"], real: CaptionedImageSet
) -> dict[str, float]:
    """Is the real picture that looks most like a drawing one of what was asked for? Shares of drawings.

    ``nearest`` holds places in ``real``, from :func:`nearest_real`. ``concept``: the nearest picture shows the concept, in any
    style. ``style``: it is of the style. ``both``: it is the picture of that concept in that style.
    """
    same_concept, same_style = real.concept[nearest] == concept, real.style[nearest] == style
    both = same_concept & same_style
    hits = {"concept": same_concept, "style": same_style, "both": both}
    return {name: float(hit.float().mean()) for name, hit in hits.items()}


def nearest_real(drawn: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> Int[Tensor, " n"]:
    """For each drawing the place of the real picture most like it: the largest cosine of their features."""
    from minilib.metrics import nearest

    return nearest(F.normalize(drawn, dim=1), F.normalize(real, dim=1))[1]


def identified(
    drawn: Float[Tensor, "n d"],
    places: Int[Tensor, " n"],
    real: Float[Tensor, "m d"],
    style: Int[Tensor, " m"],
    *,
    rivals: int = 99,
) -> float:
    """Share of drawings that look more like the picture asked for than like ``rivals`` random others of its style.

    Args:
        drawn: features of the drawings.
        places: of the pictures asked for, in ``real``.
        real: features of real pictures.
        style: of each real picture.
        rivals: so that chance is ``1 / (rivals + 1)``.
    """
    likeness = F.normalize(drawn, dim=1) @ F.normalize(real, dim=1).T
    own = likeness.gather(1, places[:, None])
    rival = style == style[places][:, None]
    rival[torch.arange(len(places)), places] = False
    order = torch.rand(rival.shape, generator=torch.Generator().manual_seed(0)).masked_fill(~rival, -1.0)
    others = order.topk(min(rivals, int(rival.sum(1).min())), dim=1).indices
    return float((own > likeness.gather(1, others)).all(1).float().mean())


def picked(data: CaptionedImageSet, n: int, seed: int) -> Int[Tensor, " n"]:
    """Places of ``n`` pictures of different concepts, the styles in turn; fixed by the seed and not chosen."""
    concepts = data.concept.unique()
    order = torch.randperm(len(concepts), generator=torch.Generator().manual_seed(seed))[:n]
    turn = torch.arange(len(order)) % len(STYLES)
    return torch.stack(
        [
            ((data.concept == concepts[i]) & (data.style == s)).nonzero().squeeze()
            for i, s in zip(order, turn, strict=True)
        ]
    )


def evaluate_emoji(
    model: nn.Module, *, n: int = 300, guidance: tuple[float, ...] = (1.0, 3.0)
) -> dict[str, Any]:
    """Known captions: is the drawing recognised? Held-out concepts: Fréchet distance, and how near to the training set."""
    from minilib.metrics import EffNetFeatures, effnet_features, effnet_report, memorisation
    from minilib.models.efficientnet import load_effnet_lite0

    train, test = load("emoji", "train", SIZE), load("emoji", "test", SIZE)
    known, new = caption_states(ENCODER, "train"), caption_states(ENCODER, "test")
    net, oracle = load_effnet_lite0(), EffNetFeatures()
    real = effnet_features(train.x, net=net)
    places = picked(train, n, seed=1)
    metrics: dict[str, Any] = {"sampler": "Euler, 25 steps", "n_held_in": n, "n_held_out": len(test)}
    for scale in guidance:
        seen = draw_emoji(model, known, train.concept[places], train.style[places], guidance_scale=scale)
        features = effnet_features(seen, net=net)
        share = recognised(nearest_real(features, real), train.concept[places], train.style[places], train)
        metrics |= {f"recognised_{key}_guidance_{scale:g}": value for key, value in share.items()}
        metrics[f"identified_among_100_guidance_{scale:g}"] = identified(features, places, real, train.style)
        unseen = draw_emoji(model, new, test.concept, test.style, guidance_scale=scale, seed=1)
        fd = effnet_report(unseen, train.x, test.x, oracle=oracle)
        copies = memorisation(unseen, train.x, test.x)
        metrics |= {
            f"EffNet_FD_guidance_{scale:g}": fd.value,
            f"EffNet_FD_floor_guidance_{scale:g}": fd.floor,
            f"EffNet_FD_ceiling_guidance_{scale:g}": fd.ceiling,
            f"nearest_train_ratio_guidance_{scale:g}": copies.ratio,
            f"copied_guidance_{scale:g}": copies.copied,
        }
    return metrics


def emoji_picture(model: nn.Module) -> bytes:
    """Not chosen: captions that were trained on, then held-out ones; real, drawn, and the nearest training picture."""
    from minilib.metrics import effnet_features
    from minilib.models.efficientnet import load_effnet_lite0

    train, net = load("emoji", "train", SIZE), load_effnet_lite0()
    real = effnet_features(train.x, net=net)
    rows = []
    for split in ("train", "test"):
        data, states = load("emoji", split, SIZE), caption_states(ENCODER, split)
        places = picked(data, 12, seed=7)
        x = draw_emoji(model, states, data.concept[places], data.style[places], seed=7)
        nearest = nearest_real(effnet_features(x, net=net), real)
        rows += [data.x[places], x, train.x[nearest]]
    labels = ["real, known", "drawn", "nearest", "real, new", "drawn", "nearest"]
    return rows_png(torch.cat(rows), labels, columns=12)


def _data_line() -> str:
    return image_set_line(load("emoji", "train", SIZE)) + " Captions as token states of all-MiniLM-L6-v2."


RECIPES: dict[str, Recipe] = {
    "mmdit_emoji": Recipe(
        summary="A text MM-DiT on emoji of 32 x 32 pixels in three styles: 64 image tokens of 4 x 4 pixels with 2-D rotary "
        "positions, width 128, 6 blocks, rectified flow with logit-normal times. It reads the token states of a real sentence "
        "encoder; the style is its pooled vector; captions and styles are each dropped in a tenth of the cases. A second cycle, "
        "of 14,000 steps, follows the first.",
        config=FitConfig(
            steps=12_000,
            batch_size=32,
            lr=1e-3,
            ema_decay=0.999,
            warmup=300,
            decay_fraction=0.5,
            mixed_precision="bf16",
        ),
        run=training_run("mmdit_emoji", _build, flow_matching, _batches, SECOND),
        evaluate=evaluate_emoji,
        data=_data_line,
        picture=emoji_picture,
        half=True,
    ),
}
