"""Learning features without labels: a student learns to predict, from a masked view, what its own average sees in another view.

Self-distillation of the whole image is DINO (Caron et al. 2021, arXiv 2104.14294; read in ``facebookresearch/dino:
main_dino.py``), of masked patches iBOT (Zhou et al. 2022, arXiv 2111.07832; read in ``bytedance/ibot: main_ibot.py``), the
reconstruction of masked pixels by a linear layer SimMIM (Xie et al. 2022, arXiv 2111.09886).

Two things differ from the papers, since our pictures are mostly background. The centre of the patches' logits is kept *for each
place*: with one centre for all, the cheapest code says where a patch is and nothing of what is in it. And views differ in light
and noise only, not in their crop, so that patches correspond; hiding patches takes the place of small crops.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from minilib.models.vit import ViT
from minilib.training import Batch, LossFn


def distillation_targets(
    logits: Float[Tensor, "*s k"], centre: Float[Tensor, "*c k"], temperature: float
) -> Float[Tensor, "*s k"]:
    """``softmax((logits - centre) / temperature)`` of the teacher, without gradient.

    Centring works against one answer for everything, the low temperature against all answers for everything (DINO, section 3.1).

    >>> distillation_targets(torch.tensor([[2.0, 5.0]]), torch.tensor([2.0, 5.0]), 0.04)
    tensor([[0.5000, 0.5000]])
    """
    return F.softmax((logits - centre) / temperature, dim=-1).detach()


def distillation_loss(
    student: Float[Tensor, "*s k"],
    targets: Float[Tensor, "*s k"],
    temperature: float = 0.1,
    mask: Bool[Tensor, "*s"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the teacher's answers and the student's, in nats.

    With a mask the mean is over its True places of a sample first, then over the samples that have any (iBOT, eq. 2).

    Raises:
        ValueError: the mask is empty.
    """
    loss = -(targets * F.log_softmax(student / temperature, dim=-1)).sum(-1)
    if mask is None:
        return loss.mean()
    counts = mask.sum(-1)
    if not bool(counts.any()):
        raise ValueError("the mask hides no patch: there is nothing to predict")
    per_sample = (loss * mask).sum(-1) / counts.clamp(min=1)
    return per_sample.sum() / (counts > 0).sum()


@torch.no_grad()
def updated_centre(
    centre: Float[Tensor, "*c k"], logits: Float[Tensor, "b *c k"], momentum: float = 0.9
) -> Float[Tensor, "*c k"]:
    """``momentum * centre + (1 - momentum) * mean of the batch`` (DINO, eq. 4), over all processes."""
    mean = logits.mean(0)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean = mean / torch.distributed.get_world_size()
    return torch.lerp(mean, centre, momentum)


def teacher_momentum(step: int, steps: int, base: float) -> float:
    """From ``base`` at step 0 to 1 at the end, along half a cosine: the teacher comes to rest.

    >>> [teacher_momentum(step, 100, 0.99) for step in (0, 50, 100)]
    [0.99, 0.995, 1.0]
    """
    return 1.0 - (1.0 - base) * (math.cos(math.pi * min(step / steps, 1.0)) + 1.0) / 2.0


def random_masks(
    n: int, patches: int, generator: torch.Generator, ratio: tuple[float, float] = (0.3, 0.6)
) -> Bool[Tensor, "{n} {patches}"]:
    """Masks that hide a random share of the patches, uniform in ``ratio``, at random places; at least one and never all.

    Raises:
        ValueError: ratios out of order or outside [0, 1].
    """
    low, high = ratio
    if not 0.0 <= low <= high <= 1.0 or patches < 2:
        raise ValueError(f"need 0 <= low <= high <= 1 and two patches; got ratio={ratio}, {patches} patches")
    share = low + (high - low) * torch.rand(n, 1, generator=generator)
    count = (share * patches).round().clamp(1, patches - 1)
    rank = torch.rand(n, patches, generator=generator).argsort(1).argsort(1)
    return rank < count


def random_light(x: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """A view of each picture: brightness, contrast and saturation changed by up to 40 %, and noise of up to 0.1.

    The hue stays, and places stay: what is where is what the features should know.
    """
    n = len(x)

    def factor() -> Tensor:
        return 0.6 + 0.8 * torch.rand(n, 1, 1, 1, generator=generator)

    y = (x + 1) / 2 * factor()
    mean = y.mean((1, 2, 3), keepdim=True)
    y = mean + (y - mean) * factor()
    grey = y.mean(1, keepdim=True)
    y = grey + (y - grey) * factor()
    strength = 0.1 * torch.rand(n, 1, 1, 1, generator=generator)
    return 2 * y - 1 + strength * torch.randn(x.shape, generator=generator)


def feature_spread(features: Float[Tensor, "n d"]) -> float:
    """How far features are from collapse: ``sqrt(d)`` times the mean standard deviation of their unit vectors.

    1 for directions in all dimensions alike, 0 if all are one (Chen and He 2021, arXiv 2011.10566, section 4.1).
    """
    return float(F.normalize(features, dim=-1).std(0).mean() * features.shape[-1] ** 0.5)


class PrototypeHead(nn.Module):
    """Tokens to logits: a two-layer network to a narrow unit vector, then cosines with unit prototypes (DINO, appendix C)."""

    def __init__(self, dim: int, hidden_dim: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, bottleneck)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s k"]:
        """Logits in [-1, 1]."""
        z = self.fc2(F.gelu(self.fc1(x)))
        return F.linear(F.normalize(z, dim=-1), F.normalize(self.prototypes, dim=-1))


class SelfDistillation(nn.Module):
    """A student, its moving average (the teacher), and the centres: everything that training changes, so that it resumes exactly.

    In training mode each call first moves the teacher towards the student as the last step left it, and then, after the
    losses, the centres. The teacher's ``vit`` is what is kept in the end.

    Args:
        vit: the student's network; the teacher starts as a copy.
        patches: patches of an image: there is a centre for each.
        steps: length of the training, for the momentum's schedule.
        prototypes: answers that student and teacher can give.
        momentum: of the teacher at the start, see ``teacher_momentum``.
        teacher_temperature: below the student's.
        student_temperature: 0.1 in DINO and iBOT.
        centre_momentum: see ``updated_centre``.
    """

    def __init__(
        self,
        vit: ViT,
        *,
        patches: int,
        steps: int,
        prototypes: int = 256,
        momentum: float = 0.99,
        teacher_temperature: float = 0.04,
        student_temperature: float = 0.1,
        centre_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        dim = vit.config["hidden_size"]
        head = PrototypeHead(dim, 2 * dim, max(dim // 2, 8), prototypes)
        self.student = nn.ModuleDict({"vit": vit, "head": head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.to_pixels = nn.Linear(dim, vit.in_channels * vit.patch_size**2)
        self.register_buffer("pooled_centre", torch.zeros(prototypes))
        self.register_buffer("patch_centre", torch.zeros(patches, prototypes))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.steps, self.momentum, self.centre_momentum = steps, momentum, centre_momentum
        self.teacher_temperature, self.student_temperature = teacher_temperature, student_temperature

    def forward(
        self,
        a: Float[Tensor, "b c h w"],
        b: Float[Tensor, "b c h w"],
        mask_a: Bool[Tensor, "b n"],
        mask_b: Bool[Tensor, "b n"],
    ) -> dict[str, Float[Tensor, ""]]:
        """The losses of two views of the same pictures and the patches that are hidden from the student in each.

        Returns:
            ``pooled``: the whole view against the other, ``patch``: hidden patches of a view against the other view's,
            both in nats; ``pixel``: mean absolute error at hidden patches.
        """
        if self.training:
            self.move_teacher()
        views, masks = torch.cat([a, b]), torch.cat([mask_a, mask_b])
        seen = self.student["vit"](views, masks)
        patches = seen[:, self.student["vit"].num_prefix :]
        pooled_logits, patch_logits = self._logits(self.teacher, views)
        pooled_targets = distillation_targets(pooled_logits, self.pooled_centre, self.teacher_temperature)
        patch_targets = distillation_targets(patch_logits, self.patch_centre, self.teacher_temperature)
        head, temperature = self.student["head"], self.student_temperature
        pooled = head(self.student["vit"].pool(seen))
        pixels = (self.to_pixels(patches) - self._patch_pixels(views)).abs().mean(-1)
        losses = {
            "pooled": distillation_loss(pooled, _swap(pooled_targets), temperature),
            "patch": distillation_loss(head(patches), _swap(patch_targets), temperature, masks),
            "pixel": (pixels * masks).sum() / masks.sum(),
        }
        if self.training:
            self.pooled_centre = updated_centre(self.pooled_centre, pooled_logits, self.centre_momentum)
            self.patch_centre = updated_centre(self.patch_centre, patch_logits, self.centre_momentum)
        return losses

    @torch.no_grad()
    def move_teacher(self) -> None:
        """One step of the teacher towards the student, and one of the clock."""
        momentum = teacher_momentum(int(self.step), self.steps, self.momentum)
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - momentum)
        self.step += 1

    @torch.no_grad()
    def _logits(self, network: nn.ModuleDict, views: Tensor) -> tuple[Tensor, Tensor]:
        tokens = network["vit"](views)
        patches = tokens[:, network["vit"].num_prefix :]
        return network["head"](network["vit"].pool(tokens)), network["head"](patches)

    def _patch_pixels(self, views: Tensor) -> Tensor:
        p = self.student["vit"].patch_size
        return rearrange(views, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)


def self_distillation_loss(weights: dict[str, float]) -> LossFn:
    """A ``loss_fn`` for ``fit``: the weighted sum of the losses of ``SelfDistillation`` on ``a``, ``b`` and their masks."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        terms: dict[str, Any] = model(batch["a"], batch["b"], batch["mask_a"], batch["mask_b"])
        return torch.stack([weights[name] * value for name, value in terms.items()]).sum()

    return loss


def _swap(x: Tensor) -> Tensor:
    """The answers for the other view: the two halves of the batch change places."""
    return torch.cat(list(reversed(x.chunk(2))))
