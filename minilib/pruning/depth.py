"""Depth pruning: which blocks of a transformer stay, by learned N:M gates or by a score, and the shallower model.

The blocks fall into groups, and of the M blocks in a group N stay. So a group has C(M, N) binary masks, and a model
with several groups their product: a *candidate* is one mask for each group. TinyFusion (Fang et al. 2025, arXiv
2412.01199) learns a categorical distribution over the masks of each group, sampled by the straight-through Gumbel
softmax, as MaskLLM (arXiv 2409.17481) does for weights; constants read in ``VainF/TinyFusion``:
``models_with_layer_pruning.py``, ``prune_by_learning.py``. ShortGPT (Men et al. 2024, arXiv 2403.03853) scores a block
by how much it turns its input.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..intervene import gate, record_inputs, record_outputs

Groups = Sequence[tuple[int, int]]


def mask_patterns(keep: int, of: int) -> Float[Tensor, "patterns of"]:
    """All binary masks of length ``of`` with ``keep`` ones, in the order of ``itertools.combinations``.

    Raises:
        ValueError: not 1 <= ``keep`` <= ``of``.

    >>> mask_patterns(1, 2)
    tensor([[1., 0.],
            [0., 1.]])
    """
    if not 1 <= keep <= of:
        raise ValueError(f"a group keeps at least one of its blocks and at most all; got {keep} of {of}")
    masks = torch.zeros(math.comb(of, keep), of)
    for row, kept in zip(masks, itertools.combinations(range(of), keep), strict=True):
        row[list(kept)] = 1.0
    return masks


def depth_candidates(groups: Groups) -> list[tuple[int, ...]]:
    """The kept blocks of every candidate: the product over groups of C(M, N) choices.

    >>> depth_candidates([(1, 2), (1, 2)])
    [(0, 2), (0, 3), (1, 2), (1, 3)]
    """
    _checked(groups)
    choices, start = [], 0
    for keep, of in groups:
        choices.append(list(itertools.combinations(range(start, start + of), keep)))
        start += of
    return [tuple(itertools.chain(*parts)) for parts in itertools.product(*choices)]


def gumbel_temperature(step: int, steps: int, start: float = 4.0, end: float = 0.1) -> float:
    """The released schedule: linear from ``start`` at step 0 to ``end`` at the last step.

    >>> gumbel_temperature(0, 300), round(gumbel_temperature(299, 300), 6)
    (4.0, 0.1)
    """
    if not 0 <= step < steps or start <= 0 or end <= 0:
        raise ValueError(
            f"need 0 <= step < steps and positive temperatures; got step {step} of {steps}, {start} to {end}"
        )
    return start + (end - start) * step / max(steps - 1, 1)


def gumbel_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard Gumbel values, ``-log(E)`` with E exponential: the largest of logits plus these is a draw from the softmax."""
    return -torch.empty(*shape).exponential_(generator=generator).log()


class NMGates(nn.Module):
    """A learned choice of N of M blocks in each group: one logit for each mask.

    The probabilities are ``softmax(scale * logits)``. All start equal. The scale makes Adam's small steps large in the
    probabilities: with 100 and a learning rate of 1e-3 one step moves a scaled logit by up to 0.1.

    Args:
        groups: ``(N, M)`` of each group, from the first blocks to the last.
        init: initial value of all logits.
        scale: multiplies the logits.

    Raises:
        ValueError: no group, or N outside 1..M.

    >>> gates = NMGates([(2, 4), (2, 4)])
    >>> gates.depth, gates.num_kept, gates.num_candidates, gates.kept()
    (8, 4, 36, (0, 1, 4, 5))
    """

    def __init__(self, groups: Groups, *, init: float = 0.02, scale: float = 100.0) -> None:
        super().__init__()
        _checked(groups)
        self.groups, self.scale = [tuple(group) for group in groups], scale
        patterns = [mask_patterns(keep, of) for keep, of in groups]
        self.logits = nn.ParameterList(nn.Parameter(torch.full((len(p),), init)) for p in patterns)
        for i, masks in enumerate(patterns):
            self.register_buffer(f"patterns_{i}", masks, persistent=False)

    @property
    def patterns(self) -> list[Tensor]:
        """The masks of each group, (patterns, M)."""
        return [getattr(self, f"patterns_{i}") for i in range(len(self.groups))]

    @property
    def depth(self) -> int:
        """Blocks of the model that these gates are for."""
        return sum(of for _, of in self.groups)

    @property
    def num_kept(self) -> int:
        """Blocks that stay."""
        return sum(keep for keep, _ in self.groups)

    @property
    def num_patterns(self) -> int:
        """Logits of all groups together: how many Gumbel values a sample takes."""
        return sum(len(p) for p in self.logits)

    @property
    def num_candidates(self) -> int:
        """Different models that can be chosen: the product over groups."""
        return math.prod(len(p) for p in self.logits)

    def probabilities(self) -> list[Float[Tensor, " patterns"]]:
        """Of each group's masks."""
        return [torch.softmax(self.scale * logits, 0) for logits in self.logits]

    def block_probabilities(self) -> Float[Tensor, " depth"]:
        """With what probability each block stays; they sum to ``num_kept``."""
        pairs = zip(self.probabilities(), self.patterns, strict=True)
        return torch.cat([p @ masks for p, masks in pairs])

    def sample(
        self, noise: Float[Tensor, "b patterns"], temperature: float, *, hard: bool = True
    ) -> Float[Tensor, "b depth"]:
        """One mask an example: 1 where the block stays. Differentiable in the logits.

        The mask drawn is that with the largest ``scale * logit + noise``. Its gradient is that of the softmax of this
        sum over the temperature (straight-through; Jang et al. 2017, arXiv 1611.01144).

        Args:
            noise: Gumbel values, ``num_patterns`` an example (:func:`gumbel_noise`); the groups' one after the other.
            temperature: above 0. Large: every mask gets a gradient, a biased one. Small: unbiased and noisy.
            hard: False gives the softmax itself, between 0 and 1.

        Raises:
            ValueError: noise of another width, or a temperature that is not positive.
        """
        if noise.shape[1] != self.num_patterns:
            raise ValueError(
                f"noise of {noise.shape[1]} values an example given; these gates have {self.num_patterns} masks"
            )
        if temperature <= 0:
            raise ValueError(f"the temperature must be above 0; got {temperature}")
        drawn = []
        parts = noise.split([len(p) for p in self.logits], dim=1)
        for logits, masks, part in zip(self.logits, self.patterns, parts, strict=True):
            soft = torch.softmax((self.scale * logits + part) / temperature, dim=1)
            if hard:
                one_hot = F.one_hot(soft.argmax(1), len(logits)).to(soft.dtype)
                soft = one_hot + (soft - soft.detach())  # in this order exactly 0 or 1
            drawn.append(soft @ masks)
        return torch.cat(drawn, 1)

    def kept(self) -> tuple[int, ...]:
        """The decision: the blocks of the most probable mask of each group."""
        best = [masks[logits.argmax()] for logits, masks in zip(self.logits, self.patterns, strict=True)]
        return tuple(torch.cat(best).nonzero().flatten().tolist())

    def confidence(self) -> list[float]:
        """The probability of that mask, a group."""
        return [float(p.detach().max()) for p in self.probabilities()]


@contextmanager
def gated_blocks(model: nn.Module, masks: Float[Tensor, "b depth"], blocks: str = "blocks") -> Iterator[None]:
    """Inside a ``with`` block, block i hands on ``m_i block(x) + (1 - m_i) x`` for each example.

    All blocks are computed, so that a mask of 0 gets a gradient too. At 1 this is the model bit for bit.

    Args:
        model: has a ``ModuleList`` called ``blocks``, whose members take the tokens first and return their like.
        masks: a row an example, or one row for all.
        blocks: the list's name.

    Raises:
        ValueError: as many columns as blocks are needed.
    """
    depth = len(_block_list(model, blocks))
    if masks.shape[1] != depth:
        raise ValueError(f"masks for {masks.shape[1]} blocks given; the model has {depth}")
    columns = [masks[0, i] if len(masks) == 1 else masks[:, i] for i in range(depth)]
    with gate(model, {f"{blocks}.{i}": column for i, column in enumerate(columns)}):
        yield


def one_hot_mask(kept: Sequence[int], depth: int) -> Float[Tensor, "1 depth"]:
    """The mask of a candidate, for :func:`gated_blocks`.

    >>> one_hot_mask((0, 2), 4)
    tensor([[1., 0., 1., 0.]])
    """
    mask = torch.zeros(1, depth)
    mask[0, list(_checked_kept(kept, depth))] = 1.0
    return mask


def drop_blocks(model: nn.Module, kept: Sequence[int], blocks: str = "blocks") -> nn.Module:
    """A copy of ``model`` with the kept blocks alone, in their order; its ``config["depth"]`` says so, and rebuilds it.

    Args:
        model: any module with a ``ModuleList`` of blocks; it is left as it is.
        kept: indices, rising.
        blocks: the list's name.

    Raises:
        ValueError: no block, one twice, out of order or not there; or a model whose ``config`` does not describe what is left,
            since its blocks are not all of one kind.

    >>> from minilib.models import DiT
    >>> small = drop_blocks(DiT(hidden_size=8, depth=4, num_heads=2), (0, 3))
    >>> len(small.blocks), small.config["depth"]
    (2, 2)
    """
    kept = _checked_kept(kept, len(_block_list(model, blocks)))
    smaller = copy.deepcopy(model)
    path, _, own = blocks.rpartition(".")
    owner = smaller.get_submodule(path)
    setattr(owner, own, nn.ModuleList([getattr(owner, own)[i] for i in kept]))
    if "depth" in getattr(model, "config", {}):
        smaller.config = {**model.config, "depth": len(kept)}
        with torch.device("meta"):
            described = type(model)(**smaller.config).state_dict()
        found = smaller.state_dict()
        if {k: v.shape for k, v in described.items()} != {k: v.shape for k, v in found.items()}:
            raise ValueError(
                f"blocks {list(kept)} of this {type(model).__name__} are no {type(model).__name__} of depth {len(kept)}: "
                "its blocks are not all of one kind; keep those that differ (the last, for instance) in their places"
            )
    return smaller


def block_influence(
    model: nn.Module, call: Callable[[nn.Module], object], blocks: str = "blocks"
) -> Float[Tensor, " depth"]:
    """ShortGPT's score of each block: 1 - the mean cosine between a token before and after it.

    0: the block does not turn its tokens, though it may stretch them. The mean is over tokens, examples and calls.

    Args:
        model: any module with a list of blocks that take the tokens first and return them.
        call: ``call(model)`` runs it on the data to judge by.
        blocks: the list's name.

    Raises:
        ValueError: ``call`` does not run the blocks.
    """
    names = [f"{blocks}.{i}" for i in range(len(_block_list(model, blocks)))]
    with torch.no_grad(), record_inputs(model, names) as before, record_outputs(model, names) as after:
        call(model)
    if not all(before[name] for name in names):
        raise ValueError("`call` ran no block: it has to run the model it is given")
    scores = []
    for name in names:
        pairs = zip(before[name], after[name], strict=True)
        cosines = torch.cat([F.cosine_similarity(x, y, dim=-1).flatten() for x, y in pairs])
        scores.append(1.0 - cosines.double().mean())
    return torch.stack(scores).float()


def keep_highest(
    scores: Float[Tensor, " depth"], keep: int, *, groups: Groups | None = None, spare_last: bool = False
) -> tuple[int, ...]:
    """The blocks with the highest scores, over all or N of M in each group.

    Args:
        scores: of each block.
        keep: how many stay; with groups the sum of their N.
        groups: ``(N, M)`` of each.
        spare_last: the last block stays whatever its score, as in TinyFusion's ``prune_by_score.py``. Not together with groups.

    Raises:
        ValueError: numbers that do not fit together.

    >>> keep_highest(torch.tensor([0.9, 0.8, 0.3, 0.1]), 2, spare_last=True)
    (0, 3)
    >>> keep_highest(torch.tensor([0.9, 0.8, 0.3, 0.1]), 2, groups=[(1, 2), (1, 2)])
    (0, 2)
    """
    scores = scores.detach().clone()
    if groups is None:
        groups = [(keep, len(scores))]
    elif spare_last:
        raise ValueError("spare_last is for scores over all blocks; with groups leave it out")
    _checked(groups)
    if sum(n for n, _ in groups) != keep or sum(m for _, m in groups) != len(scores):
        raise ValueError(f"groups {list(groups)} do not keep {keep} of {len(scores)} blocks")
    if spare_last:
        scores[-1] = math.inf
    chosen, start = [], 0
    for n, m in groups:
        chosen += [start + int(i) for i in scores[start : start + m].topk(n).indices]
        start += m
    return tuple(sorted(chosen))


def _checked(groups: Groups) -> None:
    if not groups:
        raise ValueError("no group given: give (N, M) for each, for example [(2, 4), (2, 4)]")
    for keep, of in groups:
        if not 1 <= keep <= of:
            raise ValueError(f"a group keeps at least one of its blocks and at most all; got {keep} of {of}")


def _checked_kept(kept: Sequence[int], depth: int) -> tuple[int, ...]:
    kept = tuple(kept)
    if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < depth:
        raise ValueError(
            f"kept blocks must be rising indices from 0 to {depth - 1}, at least one; got {kept}"
        )
    return kept


def _block_list(model: nn.Module, name: str) -> nn.ModuleList:
    found = dict(model.named_modules()).get(name)
    if not isinstance(found, nn.ModuleList) or not len(found):
        lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
        raise ValueError(
            f"{type(model).__name__} has no list of blocks {name!r}; its lists are {lists or 'none'}"
        )
    return found
