# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # TinyFusion: learn which blocks to drop
#
# A transformer becomes faster if whole blocks are left out. But which? {cite:t}`tinyfusion` do not ask which blocks can go with the least harm *now*. They ask which small model will be best *after it has been trained a little more*, and learn the answer by gradient descent.
#
# This page takes a model so small that the answer can be known: all 36 candidates are fine-tuned. So each way of choosing gets a rank. In short: the learned choice is the best of the 36. A far cheaper score, bound to the same groups, makes the same choice, and without the groups that score does slightly better than the method with them. Freed from the groups too, the method is ahead. For samples of such simple digits, no pruned model here beats the full one with fewer solver steps.

# %% tags=["remove-cell"]
# On Colab this installs the library and leaves the torch that is there alone; elsewhere it does nothing.
try:
    import minilib  # noqa: F401
except ImportError:
    # %pip install -q "minilib @ git+https://github.com/minilib-book/minilib"
    pass

# %% tags=["parameters", "remove-cell"]
profile = "auto"

# %% tags=["hide-input"]
from copy import deepcopy
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display

from minilib import zoo
from minilib.adapters import add_lora
from minilib.arms import run_arms
from minilib.bench import ratio
from minilib.caching import equal_cost_steps
from minilib.costs import dit_flops
from minilib.data import load
from minilib.distillation import DistillationLoss, feature_loss, last_of_each_share
from minilib.losses import denoising_loss
from minilib.metrics import class_accuracy, frechet_report
from minilib.models import DIT_CONFIGS, DiT
from minilib.plotting import PALETTE, curve, mean_interval, show_images, use_style
from minilib.profiling import count_flops, count_parameters
from minilib.pruning import (
    NMGates,
    block_influence,
    depth_candidates,
    drop_blocks,
    gated_blocks,
    gumbel_noise,
    gumbel_temperature,
    keep_highest,
    mask_patterns,
    one_hot_mask,
)
from minilib.recipes.digits import ddpm_scheduler, sample_digits
from minilib.recipes.digits_p2 import digits_batches, digits_loss
from minilib.reproduction import Reproduction
from minilib.training import FitConfig, fit, step_generator, update_ema


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # each: gates, fine-tuning data, held-out noise of its own
    every: int  # fine-tune every n-th candidate: 1 is all of them
    gate_steps: int  # of learning the gates
    gate_batch: int
    lora_steps: int  # of a short recovery with low-rank updates
    tune_steps: int  # of fine-tuning a candidate
    tune_batch: int  # of both
    recovery_steps: int  # of the distillation at the end
    recovery_batch: int
    copies: int  # of the held-out images, with different noise
    solver_steps: int  # of the sampler
    jobs: int  # processes


run = Reproduction(
    "tinyfusion",
    profile,
    {
        "smoke": Settings((0,), 12, 4, 8, 2, 2, 8, 5, 8, 1, 4, 1),
        "cpu": Settings((0, 1, 2), 1, 150, 64, 20, 80, 32, 240, 64, 1, 25, 2),
        "gpu": Settings((0, 1, 2, 3, 4), 1, 2000, 128, 100, 500, 64, 3000, 128, 4, 25, 1),
    },
)
s = run.settings
use_style()
run.show_card()

# %% [markdown]
# ## Settings
#
# The model is a diffusion transformer (DiT, {cite:t}`peebles2023scalable`) that draws handwritten digits of $8 \times 8$ pixels: 16 tokens, eight blocks. It was trained once, by the recipe `dit_digits_p2`; nothing on this page trains a base model. Candidates learn from the training images, are judged after pruning on the validation images, and after fine-tuning on the test images.

# %%
run.show_settings()

# %% [markdown]
# (sec-tinyfusion-idea)=
# ## The idea
#
# Let $f_i$ be block $i$ of $L$, its skip connections included, and $x_i$ the tokens that go into it. Give each block a bit $m_i$:
#
# $$
# x_{i+1} = m_i\, f_i(x_i) + (1 - m_i)\, x_i .
# $$ (eq-tinyfusion-gate)
#
# At $m_i = 0$ the tokens pass as they are, and the block need not be computed. To choose half of the blocks is to choose a *mask* $m$ with $L/2$ ones. Write $\Phi$ for the weights and $\mathcal L$ for the loss of the diffusion model. The plain way to choose looks at
#
# $$
# \min_m\; \mathcal L(m, \Phi) ,
# $$ (eq-tinyfusion-plain)
#
# the loss right after pruning, which the paper calls the *calibration loss*. But nobody uses the model at that point. It will be fine-tuned, so its weights will change by some $\Delta\Phi$. What counts is
#
# $$
# \min_m\; \min_{\Delta\Phi}\; \mathcal L(m, \Phi + \Delta\Phi) .
# $$ (eq-tinyfusion-recoverable)
#
# The paper calls this *recoverability*. The inner minimum is a whole training run, too dear for each mask. So both are learned together, with three tools:
#
# - **Local groups.** The blocks fall into groups of $M$ neighbours, and in each $N$ stay. A group has $\binom M N$ masks, few enough to list. Each gets a logit, and with them a probability.
# - **A differentiable draw.** For each training example one mask a group is drawn from these probabilities. The draw is a hard one, but has the gradient of a soft one (below). So the logits learn which masks do well.
# - **A cheap update.** Meanwhile $\Delta\Phi$ is learned too, as a product of thin matrices beside each layer (LoRA, rank 8; the weights themselves stay frozen). It is shared by all masks, and moves with them. It stands for the fine-tuning to come.
#
# At the end the most probable mask of each group is kept. *The update is thrown away:* the blocks that stay have their original weights, and are then trained in earnest. $\Delta\Phi$ had one task, to change the question.
#
# How many choices are there?

# %%
# NBVAL_CHECK_OUTPUT
GROUPS = ((2, 4), (2, 4))  # keep 2 of the first 4 blocks and 2 of the last 4
candidates = depth_candidates(GROUPS)
counts = {"8 blocks, 2:4": GROUPS, "8 blocks, 1:2": ((1, 2),) * 4}
counts |= {f"28 blocks, {n}:{m}": ((n, m),) * (28 // m) for n, m in ((1, 2), (2, 4), (7, 14))}
for name, groups in counts.items():
    print(f"{name:16s} {NMGates(groups).num_candidates:12,d} candidates")
print("the first three of ours:", *candidates[:3])

# %% [markdown]
# For DiT-XL with its 28 blocks nobody can try them all. For eight blocks we can, and will.
#
# (sec-tinyfusion-method)=
# ## The method
#
# ### A draw with a gradient
#
# Let $g_k$ be the logit of mask $k$ in a group. Add independent Gumbel noise $\gamma_k$ to each (Gumbel: $-\log$ of an exponentially distributed number). The largest sum $100\, g_k + \gamma_k$ belongs to mask $k$ with exactly the softmax probability of $100\, g_k$. That is the draw. Taking the largest has no useful gradient, so the backward pass pretends that a softmax of temperature $\tau$ was used:


# %%
def draw_masks(logits, patterns, noise, temperature):
    """One mask of a group for each example. logits (k,), patterns (k, M), noise (b, k) -> (b, M)."""
    soft = torch.softmax((100 * logits + noise) / temperature, dim=1)
    hard = F.one_hot(soft.argmax(1), len(logits))
    return (
        hard + (soft - soft.detach())
    ) @ patterns  # the value of the hard draw, the gradient of the soft one


# %% [markdown]
# At a high temperature all masks of a group share in the gradient. It is smooth and too short. At a low one it has about the right length and is very noisy (exercise 1). The released code lowers $\tau$ linearly from 4 to 0.1. The factor 100 is there for the optimiser: Adam moves each logit by about its learning rate a step, $10^{-3}$, and a hundred times that is a change of 0.1 in what the softmax sees.
#
# The library's `NMGates` does this for all groups at once. We check that each draw keeps $N$ of $M$, that all 36 candidates come up, and that a gated model is the pruned one:

# %%
model = zoo.load("dit_digits_p2").to(run.device)
depth, kept_blocks = len(model.blocks), sum(n for n, _ in GROUPS)
gates, generator = NMGates(GROUPS), torch.Generator().manual_seed(7)
noise = gumbel_noise((10_000, gates.num_patterns), generator)
drawn = gates.sample(noise, 4.0).detach()
by_hand = torch.cat(
    [draw_masks(gates.logits[i], mask_patterns(2, 4), noise[:, 6 * i : 6 * i + 6], 4.0) for i in (0, 1)], 1
)
run.record("ones", int((drawn.reshape(-1, 2, 4).sum(2) != 2).sum() + (drawn != by_hand).sum()))
distinct = len(drawn.unique(dim=0))
run.record("candidates", abs(distinct - 36) + abs(NMGates(((1, 2),) * 4).num_candidates - 16))

batch = {name: value.to(run.device) for name, value in digits_batches()(generator, 16).items()}
x_t = ddpm_scheduler().add_noise(batch["x0"], batch["noise"], batch["t"])
with torch.no_grad():
    whole = model(x_t, batch["t"], batch["y"])
    with gated_blocks(model, torch.ones(1, depth)):
        run.record("neutral", float((model(x_t, batch["t"], batch["y"]) - whole).abs().max()))
    apart = []
    for kept in candidates:
        with gated_blocks(model, one_hot_mask(kept, depth).to(run.device)):
            gated = model(x_t, batch["t"], batch["y"])
        apart.append(float((gated - drop_blocks(model, kept)(x_t, batch["t"], batch["y"])).abs().max()))
    run.record("gated", max(apart))
with gated_blocks(model, gates.sample(noise[:16], 4.0).to(run.device)):
    digits_loss()(model, batch).backward()
run.record("gradient", sum(int((logits.grad == 0).sum()) for logits in gates.logits))

# %%
# NBVAL_CHECK_OUTPUT
print(
    "masks drawn:",
    tuple(drawn.shape),
    "| candidates among them:",
    distinct,
    "| ones in each:",
    *drawn.sum(1).unique().tolist(),
)

# %% [markdown]
# ### What is saved
#
# The blocks are nearly all of a DiT. So half of the blocks is half of the work, here and at the paper's size. We count multiply-accumulates (MACs) on torch's `meta` device, where tensors have shapes and no values.


# %%
def size_and_work(net):
    """Parameters and MACs of an image, of the whole network and of its blocks alone."""
    inputs = (
        torch.zeros(1, net.in_channels, net.input_size, net.input_size),
        torch.zeros(1),
        torch.zeros(1).long(),
    )
    ends = drop_blocks(net, (0,))
    ends.blocks = torch.nn.ModuleList()
    all_macs, end_macs = (count_flops(n, *inputs).macs for n in (net, ends))
    return count_parameters(net), all_macs, count_parameters(net.blocks), all_macs - end_macs


with torch.device("meta"):
    xl = DiT(**DIT_CONFIGS["DiT-XL/2"])
off, saved = 0, {}
for name, net, kept in (("here", model, candidates[0]), ("DiT-XL/2", xl, tuple(range(0, 28, 2)))):
    before, after = size_and_work(net), size_and_work(drop_blocks(net, kept))
    off += sum(abs(2 * a - b) for a, b in zip(after[2:], before[2:], strict=True))
    saved[name] = before[1] / after[1]
    print(
        f"{name:9s} parameters {before[0]:,} -> {after[0]:,}   MACs an image {before[1]:,} -> {after[1]:,}   factor {saved[name]:.3f}"
    )
run.record("share", off)
run.record("xl", saved["DiT-XL/2"])

# %% [markdown]
# The paper measures twice the speed for 14 of 28 blocks. That is this count.
#
# ### The loop
#
# Here is the whole search, in three arms: with the low-rank update, as the paper has it; the ablation without, which learns {eq}`eq-tinyfusion-plain`; and with the update but without the restriction to groups, as one group of four in eight with its 70 masks. All see the same data and noise, the first two also the same Gumbel values. The gates keep an exponential moving average, which decides.


# %%
def learn_gates(arm, seed):
    """The kept blocks, and the probability of each block along the way."""
    update, groups = arm
    model, make_batch, loss_of_batch = zoo.load("dit_digits_p2"), digits_batches(), digits_loss()
    gates = NMGates(groups)  # all logits 0.02, times 100
    average = deepcopy(gates)
    parameters = [{"params": list(gates.parameters()), "lr": 1e-3}]
    if update:
        lora = add_lora(model, "blocks.*.**", rank=8, alpha=16, generator=torch.Generator().manual_seed(seed))
        parameters += [{"params": lora.parameters(), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    history = []
    for step in range(s.gate_steps):
        generator = step_generator(seed, step)
        batch = make_batch(generator, s.gate_batch)
        noise = gumbel_noise((s.gate_batch, gates.num_patterns), generator)
        masks = gates.sample(noise, gumbel_temperature(step, s.gate_steps))  # one mask an example
        with gated_blocks(model, masks):
            loss_of_batch(model, batch).backward()
        torch.nn.utils.clip_grad_norm_([p for group in parameters for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(average, gates, 0.97, step)
        history.append(average.block_probabilities().detach())
    return average.kept(), torch.stack(history)


SEARCHES = {"TinyFusion": (True, GROUPS), "mask only": (False, GROUPS), "TinyFusion, 4:8": (True, ((4, 8),))}
learned = run_arms(learn_gates, SEARCHES, s.seeds, s.jobs)
for name, results in learned.items():
    print(f"{name:15s} keeps", *(kept for kept, _ in results))

# %% [markdown]
# Two constants are not the paper's, since our run is short. It has ten thousand steps; the update's learning rate is $10^{-4}$ there, and its average has a decay of 0.999, so it looks back a tenth of the run. Ours are $10^{-3}$ and 0.97, which looks back some thirty steps: more than a tenth of the run in the profile `cpu`, less in `gpu`. The gates' learning rate is the released one.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two heat maps of eight rows, one a block, against the step. All rows start at one half. In both, blocks 0 and 7 turn bright first, and block 4 follows. With the update, block 7 fades again, and in the lower group block 1 comes out ahead of blocks 2 and 3. Without it, block 7 stays bright and block 3 is ahead instead."}, "figure": {"caption": "Decisions over time: the probability that a block stays, first seed. Left: with the low-rank update, as in TinyFusion. Right: the gates alone. The white line parts the two groups.", "name": "fig-tinyfusion-decisions"}}
fig, axes = plt.subplots(1, 2, figsize=(7, 2.7), layout="constrained", sharey=True)
for ax, name in zip(axes, ("TinyFusion", "mask only"), strict=True):
    picture = ax.imshow(learned[name][0][1].T, aspect="auto", vmin=0, vmax=1, cmap="viridis", origin="lower")
    ax.axhline(GROUPS[0][1] - 0.5, color="white", lw=1)
    ax.set(xlabel="step", title=name, yticks=range(depth))
    ax.grid(False)
axes[0].set_ylabel("block")
fig.colorbar(picture, ax=axes, label="probability of staying", shrink=0.9)
plt.show()

# %% [markdown]
# ## The experiment
#
# ### The truth, by enumeration
#
# Each candidate is fine-tuned in the same way, all weights, same data, same noise. Three losses are noted: right after pruning; after a short recovery with a low-rank update alone, which starts from the pruned model again; and after fine-tuning. All are the squared error of the predicted noise.


# %%
def held_out(split, seed):
    """A fixed batch of held-out images with noise and times."""
    data, generator = load("digits", split), torch.Generator().manual_seed(10_000 + seed)
    x, y = data.x.repeat(s.copies, 1, 1, 1), data.y.repeat(s.copies)
    t = (1000 * torch.rand(len(x), generator=generator)).long()
    return {"x0": x, "y": y, "t": t, "noise": torch.randn(x.shape, generator=generator)}


@torch.no_grad()
def noise_error(model, batch):
    """Mean squared error of the predicted noise."""
    return float(denoising_loss(ddpm_scheduler())(model.eval(), batch))


def three_losses(kept, seed):
    """Validation loss after pruning, validation loss after a low-rank recovery, test loss after fine-tuning."""
    calibration, test = held_out("validation", seed), held_out("test", seed)
    pruned, rest = (
        drop_blocks(zoo.load("dit_digits_p2"), kept),
        {"decay_fraction": 0.0, "warmup": 5, "seed": seed},
    )
    low_rank = deepcopy(pruned)
    add_lora(low_rank, "blocks.*.**", rank=8, alpha=16, generator=torch.Generator().manual_seed(seed))
    short = FitConfig(s.lora_steps, s.tune_batch, lr=2e-3, ema_decay=0.9, **rest)
    recovered = fit(low_rank, digits_loss(), digits_batches(), short).ema
    config = FitConfig(s.tune_steps, s.tune_batch, lr=1e-3, ema_decay=0.95, **rest)
    tuned = fit(deepcopy(pruned).requires_grad_(True), digits_loss(), digits_batches(), config).ema
    return noise_error(pruned, calibration), noise_error(recovered, calibration), noise_error(tuned, test)


# %% [markdown]
# ### The other ways to choose
#
# - **Greedy**: the candidate with the lowest calibration loss. With 36 candidates this is {eq}`eq-tinyfusion-plain` solved exactly.
# - **ShortGPT** {cite:p}`men2025shortgpt`: a block that hardly turns its tokens can go. Its score is $1 - \cos$ of the angle between a token before and after the block. The released script lets the last block stay. It ignores the groups, so its choice may lie outside the 36; then it is fine-tuned as one more.
# - **ShortGPT in groups**: the same score, two of four.
# - **Alternate**: after BK-SDM {cite:p}`kim2023bksdm`, the first block of each pair in the first half, the last of each pair in the second. No data needed.
# - **At random**: the mean of all candidates.
#
# The rank counts how many of the 36 are better. A choice from outside the 36 gets its rank in the same way, so two choices can both have rank 1; their losses tell them apart.

# %%
scores = {}
for seed in s.seeds:
    batch = held_out("validation", seed)
    inputs = (ddpm_scheduler().add_noise(batch["x0"], batch["noise"], batch["t"]), batch["t"], batch["y"])
    scores[seed] = block_influence(zoo.load("dit_digits_p2"), lambda net, inputs=inputs: net(*inputs))
picks = {name: [kept for kept, _ in results] for name, results in learned.items()}
picks["ShortGPT"] = [keep_highest(scores[seed], kept_blocks, spare_last=True) for seed in s.seeds]
picks["ShortGPT in groups"] = [keep_highest(scores[seed], kept_blocks, groups=GROUPS) for seed in s.seeds]
picks["alternate"] = [(0, 2, 5, 7)] * len(s.seeds)
print("ShortGPT's scores, first seed:", *(f"{v:.3f}" for v in scores[s.seeds[0]].tolist()))

wanted = candidates[:: s.every] + sorted({kept for chosen in picks.values() for kept in chosen})
wanted = list(dict.fromkeys(wanted))  # each once
losses = run_arms(three_losses, {kept: kept for kept in wanted}, s.seeds, s.jobs)
inside = [kept for kept in wanted if kept in candidates]
before, low_rank, after = torch.tensor([losses[kept] for kept in inside]).permute(
    2, 1, 0
)  # each (seeds, candidates)
picks["greedy"] = [inside[i] for i in before.argmin(1).tolist()]


# %% [markdown]
# ## Results
#
# ### Who chose well?


# %%
def final(name):
    """Test loss after fine-tuning of what a method chose: one number a seed."""
    return torch.tensor([losses[kept][i][2] for i, kept in enumerate(picks[name])])


def rank(name):
    """1 + the number of candidates that are better after fine-tuning, a seed."""
    return 1 + (after < final(name)[:, None]).sum(1)


print(
    f"full model: test loss {noise_error(model, held_out('test', s.seeds[0])):.4f}; mean of all candidates {after.mean():.4f}, best {after.min(1).values.mean():.4f}"
)
for name in picks:
    print(
        f"{name:19s} rank of {len(inside)}:",
        *(f"{r:2d}" for r in rank(name).tolist()),
        f"  test loss {final(name).mean():.4f}  ",
        *picks[name],
        "" if set(picks[name]) <= set(candidates) else "(outside the 36)",
    )
chosen = final("TinyFusion")
run.record("rank", rank("TinyFusion").double())
run.record("mean", chosen / after.mean(1))
run.record("shortgpt", chosen / final("ShortGPT"))
run.record("shortgpt-groups", chosen / final("ShortGPT in groups"))
run.record("one-group", final("TinyFusion, 4:8") / final("ShortGPT"))
run.record("update", chosen / final("mask only"))
run.record("greedy", chosen / final("greedy"))

# %% tags=["hide-input"] mystnb={"image": {"alt": "A cloud of 36 points, loss after fine-tuning against loss right after pruning, on a logarithmic axis. Points that keep block 0 lie low, the others high. Within the low group the order along the two axes differs. Outlined marks show the choices of the methods; two crosses, outside the cloud, lie lowest of all."}, "figure": {"caption": "All 36 candidates, before and after fine-tuning: means over seeds; bars: 90 % intervals of the loss after fine-tuning. Filled: candidates that keep block 0. Marked: what each method chose in the first seed. The two crosses are choices outside the 36. The seeds differ in their held-out noise, which all candidates share, so the bars are wider than the uncertainty of the order. The dashed line is the mean of all, a choice at random.", "name": "fig-tinyfusion-candidates"}}
MARKS = {
    "TinyFusion": (PALETTE[1], "o", 13),
    "mask only": (PALETTE[4], "s", 12),
    "greedy": (PALETTE[2], "D", 16),
    "ShortGPT in groups": (PALETTE[3], "^", 15),
    "alternate": (PALETTE[6], "v", 15),
    "ShortGPT": (PALETTE[3], "P", 9),
    "TinyFusion, 4:8": (PALETTE[1], "X", 9),
}
fig, ax = plt.subplots(figsize=(6.6, 4.4), layout="constrained")
mean, low, high = mean_interval(after)
x = before.mean(0)
for keeps, fill in ((True, PALETTE[0]), (False, "white")):
    pick = [i for i, kept in enumerate(inside) if (0 in kept) == keeps]
    if pick:
        bars = torch.stack([mean - low, high - mean])[:, pick]
        label = "keeps block 0" if keeps else "drops block 0"
        ax.errorbar(
            x[pick],
            mean[pick],
            bars,
            fmt="o",
            ms=5,
            mfc=fill,
            mec=PALETTE[0],
            ecolor="0.75",
            elinewidth=1,
            ls="",
            label=label,
        )
for name, (colour, marker, size) in MARKS.items():
    kept = picks[name][0]
    right_after, _, at_the_end = torch.tensor(losses[kept]).mean(0)
    ax.plot(
        right_after,
        at_the_end,
        marker,
        ms=size,
        mfc="none",
        mec=colour,
        mew=1.8,
        ls="",
        label=f"{name}: {', '.join(map(str, kept))}",
    )
ax.axhline(float(after.mean()), color="0.4", lw=1, ls="--")
ax.set(xscale="log", xlabel="calibration loss: right after pruning", ylabel="test loss after fine-tuning")
ax.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
ax.xaxis.set_minor_formatter(lambda v, _: f"{v:g}" if round(10 * v) in (3, 4, 6, 8, 15) else "")
ax.legend(
    fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, handletextpad=0.4, markerscale=0.6
)
plt.show()

# %% [markdown]
# {numref}`fig-tinyfusion-candidates` is the page in one picture. If the calibration loss were enough, the points would lie on a rising line. They fall into two clouds instead, by block 0, and within neither do they rise.
#
# ### Is the calibration loss enough?
#
# We compare two forecasts of the final order: the calibration loss, and the loss after a short low-rank recovery. Spearman's correlation compares orders: 1 is the same order. Chance is in the choice of candidates too, so we resample these a thousand times, the same ones for both forecasts; a candidate that is drawn twice counts once. For comparison: how well does one seed's final order forecast another's?


# %%
def spearman(a, b):
    """Rank correlation of two rows of values without ties."""
    return float(torch.corrcoef(torch.stack([v.argsort().argsort().double() for v in (a, b)]))[0, 1])


gap = []
for i, seed in enumerate(s.seeds):
    a, b = spearman(before[i], after[i]), spearman(low_rank[i], after[i])
    generator, resampled = torch.Generator().manual_seed(seed), []
    for _ in range(1000):
        again = torch.randint(len(inside), (len(inside),), generator=generator).unique()
        resampled.append(
            spearman(low_rank[i, again], after[i, again]) - spearman(before[i, again], after[i, again])
        )
    low, high = torch.tensor(resampled).nan_to_num().quantile(torch.tensor([0.1, 0.9])).tolist()
    gap.append(b - a)
    print(
        f"seed {seed}: after pruning {a:.3f}, after a short recovery {b:.3f}, difference {b - a:+.3f}, 80 % of resamplings {low:+.3f} to {high:+.3f}"
    )
run.record("forecast", gap)
if len(s.seeds) > 1:
    print(
        f"the final order of the first seed forecasts that of the second: {spearman(after[0], after[1]):.3f}"
    )
top = [i for i, kept in enumerate(inside) if 0 in kept]
if len(top) > 2:
    print(
        "among the candidates that keep block 0: after pruning",
        *(f"{spearman(before[i, top], after[i, top]):.3f}" for i in range(len(s.seeds))),
        "| after a short recovery",
        *(f"{spearman(low_rank[i, top], after[i, top]):.3f}" for i in range(len(s.seeds))),
    )

# %% [markdown]
# (sec-tinyfusion-recovery)=
# ### Recovery
#
# The chosen model is now trained for longer. The teacher is at hand: the full model. *Knowledge distillation* (KD) adds its predictions as targets. With $\hat\epsilon_S$ of the student, $\hat\epsilon_T$ of the teacher, and the ordinary loss $\mathcal L$:
#
# $$
# \mathcal L_{\mathrm{KD}} = 0.9 \left( \lVert \hat\epsilon_S - \hat\epsilon_T \rVert^2 + \mathrm{KL}_{\text{variances}} \right) + 0.1\, \mathcal L + \beta\, \mathcal L_{\text{features}} .
# $$ (eq-tinyfusion-kd)
#
# A DiT predicts the variance of each step too, and KL, the Kullback-Leibler divergence from teacher to student, trains these. $\mathcal L$ includes the usual term for the variances. The last term compares the tokens after blocks of student and teacher; $\beta$ falls from $10^{-2}$ to 0. Large transformers have a few *massive activations* {cite:p}`sun2024massive`, hundreds or thousands of times larger than a typical one. A squared difference would be about them alone. So the paper sets to zero what lies more than two standard deviations from the mean. Mean and deviation are those of one example's feature: all tokens and channels after one block. This small model has no values of that size (first line below), so the rule is tested on made-up features: one channel of 96, times a hundred.

# %%
seen = []
hooks = [
    block.register_forward_hook(lambda _, __, tokens: seen.append(tokens.abs())) for block in model.blocks
]
with torch.no_grad():
    model(*inputs)
for hook in hooks:
    hook.remove()
print("largest over median, after each block:", *(f"{float(v.max() / v.median()):.0f}" for v in seen))

a, b = torch.randn(2, 8, 16, 96, generator=torch.Generator().manual_seed(1))
loud = torch.ones(96)
loud[5] = 100.0
for claim, deviations in (("feature-plain", None), ("feature-masked", 2.0)):
    quiet = feature_loss(a, b, deviations=deviations)
    change = float(feature_loss(loud * a, loud * b, deviations=deviations) / quiet)
    run.record(claim, change)
    print(f"{claim:15s} loss {float(quiet):.2f}; with massive activations {change:8.2f} times as much")

# %% [markdown]
# :::{admonition} In the released code
# :class: tip
# [`training_losses_kd_rep`](https://github.com/VainF/TinyFusion/blob/main/diffusion/gaussian_diffusion.py) masks each side by its own statistics and then subtracts. Where only one side is masked, the other is compared with zero. [`train_masked_kd.py`](https://github.com/VainF/TinyFusion/blob/main/train_masked_kd.py) pairs block $i$ of the student with block $2i + 1$ of the teacher, whichever blocks were kept, and lowers $\beta$ once an epoch. We do the same.
# [`prune_by_score.py`](https://github.com/VainF/TinyFusion/blob/main/prune_by_score.py) measures ShortGPT's score on clean latents with times below 250, as far as we read; on this page it is measured on noisy images at all times. [`prune_by_learning.py`](https://github.com/VainF/TinyFusion/blob/main/prune_by_learning.py) clips the gradients of gates and update together; so does our loop.
# :::
#
# The rule does not undo the loud channel wholly: the masked loss still grows, though by less than a factor of two. The channel widens the deviation, so ordinary tails that were cut before now count. And its own smaller values lie within the wider limit.
#
# Three arms. The two rivals get more steps than the method, so that their **total cost** is not smaller: distillation pays for the teacher's forward pass, and the search for the gates was not free either.
#
# - **Distilled**: TinyFusion's choice, trained with {eq}`eq-tinyfusion-kd`.
# - **Fine-tuned**: the same choice, the ordinary loss. As many operations as the distillation.
# - **From scratch**: a new model with as many blocks, the ordinary loss. As many operations as the distillation and the search together. Nothing of the large model is used. The large model's own training is not counted for anyone: it is taken as given, as in the paper.
#
# A backward pass counts as two forward passes; steps are rounded up.

# %%
full_work, half_work = dit_flops(model.config), dit_flops({**model.config, "depth": kept_blocks})
step_work = {
    "distilled": 3 * half_work + full_work,
    "fine-tuned": 3 * half_work,
    "from scratch": 3 * half_work,
}
search_work = 3 * full_work * s.gate_batch * s.gate_steps
distil_work = step_work["distilled"] * s.recovery_batch * s.recovery_steps
STEPS = {
    "distilled": s.recovery_steps,
    "fine-tuned": equal_cost_steps(distil_work, step_work["fine-tuned"] * s.recovery_batch),
    "from scratch": equal_cost_steps(distil_work + search_work, step_work["from scratch"] * s.recovery_batch),
}
print(
    "steps:", STEPS, f"| search {search_work / 1e12:.2f} TFLOP, distillation {distil_work / 1e12:.2f} TFLOP"
)


def recover(arm, seed):
    """Steps and test losses along the way, and the average of the weights at the end."""
    teacher, test, seen = zoo.load("dit_digits_p2"), held_out("test", seed), []
    torch.manual_seed(seed)
    if arm == "from scratch":
        student = DiT(**{**teacher.config, "depth": kept_blocks})
    else:
        student = drop_blocks(teacher, picks["TinyFusion"][s.seeds.index(seed)]).requires_grad_(True)
    loss = digits_loss()
    if arm == "distilled":
        loss = DistillationLoss(ddpm_scheduler(), teacher, pairs=last_of_each_share(kept_blocks, depth))

    def watch(step, average, _):
        seen.append((step, noise_error(average, test)))
        if arm == "distilled":
            loss.feature_weight = 1e-2 * max(0.0, 1 - step / s.recovery_steps)

    config = FitConfig(
        STEPS[arm], s.recovery_batch, lr=1e-3, warmup=20, decay_fraction=0.0, ema_decay=0.99, seed=seed
    )
    average = fit(
        student, loss, digits_batches(), config, callback=watch, callback_every=s.recovery_steps // 5
    ).ema
    return seen, average


recovered = run_arms(recover, {arm: arm for arm in STEPS}, s.seeds, s.jobs)
at_equal_steps = {
    arm: torch.tensor([dict(seen)[s.recovery_steps] for seen, _ in results])
    for arm, results in recovered.items()
}
at_equal_cost = {
    arm: torch.tensor([seen[-1][1] for seen, _ in results]) for arm, results in recovered.items()
}
for arm in STEPS:
    print(
        f"{arm:13s} test loss at {s.recovery_steps} steps {at_equal_steps[arm].mean():.4f}, at equal cost ({STEPS[arm]} steps) {at_equal_cost[arm].mean():.4f}"
    )
run.record("kd-steps", at_equal_steps["distilled"] / at_equal_steps["fine-tuned"])
run.record("tune-scratch", at_equal_steps["fine-tuned"] / at_equal_steps["from scratch"])
run.record("kd-cost", at_equal_cost["distilled"] / at_equal_cost["fine-tuned"])
run.record("scratch-cost", at_equal_cost["distilled"] / at_equal_cost["from scratch"])

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels of falling curves. Left, against steps: from scratch is far above, fine-tuned and distilled lie close together below. Right, against the cost: the pruned models start later, where the search ends, are below the model from scratch at once, and run nearly on top of each other. A dotted line, the full model, lies below all."}, "figure": {"caption": "Recovery, four blocks of eight. Left: against steps. Right: against all operations spent since the full model was there; the pruned models start where the search ends. Dotted: the full model. Bands: 90 % intervals over seeds; most of their width is held-out noise that all arms share, so the claims compare arms seed by seed.", "name": "fig-tinyfusion-recovery"}}
full_loss = [noise_error(model, held_out("test", seed)) for seed in s.seeds]
fig, axes = plt.subplots(1, 2, figsize=(7, 3.1), layout="constrained", sharey=True)
for colour, (arm, results) in zip((PALETTE[1], PALETTE[0], PALETTE[6]), recovered.items(), strict=True):
    steps = [step for step, _ in results[0][0]]
    values = torch.tensor([[value for _, value in seen] for seen, _ in results])
    start = 0 if arm == "from scratch" else search_work
    spent = [(start + step * s.recovery_batch * step_work[arm]) / 1e12 for step in steps]
    curve(axes[0], steps, values, arm, colour)
    curve(axes[1], spent, values, arm, colour)
for ax, label in zip(axes, ("training steps", "operations spent in TFLOP"), strict=True):
    ax.axhline(sum(full_loss) / len(full_loss), color="0.3", lw=1, ls=":")
    ax.set(xlabel=label, xlim=(0, None), yscale="log")
    ax.set_yticks(
        [0.12, 0.14, 0.16, 0.2, 0.25, 0.3, 0.4], ["0.12", "0.14", "0.16", "0.20", "0.25", "0.30", "0.40"]
    )
    ax.minorticks_off()
axes[0].set_ylabel("test loss")
axes[0].legend(fontsize=9)
plt.show()

# %% [markdown]
# ### In samples
#
# A smaller model is wanted for its samples. It has a plain rival that needs no training at all: the full model with half as many solver steps. Both cost about the same for each image: half of an odd number of steps is rounded up, which favours the rival a little. We draw one digit for each label of the test images, without guidance, with DPM-Solver++ {cite:p}`lu2022dpm`. The Fréchet distance compares the features of a small classifier, the oracle, on samples and on training images. Its *floor* is the distance of the test images themselves; with few images a good set of samples may by chance fall below it. Its *ceiling* is that of independent noise with the right mean and spread in each pixel.

# %%
half_steps = -(-s.solver_steps // 2)
SWEEP = sorted({2, 4, 7, half_steps, s.solver_steps})
SAMPLERS = {("full", steps): ("full", steps) for steps in SWEEP}
SAMPLERS |= {
    (arm, steps): (arm, steps)
    for arm in ("distilled", "from scratch")
    for steps in (half_steps, s.solver_steps)
}


def draw_and_judge(setting, seed):
    """Fréchet report, accuracy, and the samples themselves."""
    arm, steps = setting
    net = zoo.load("dit_digits_p2") if arm == "full" else recovered[arm][s.seeds.index(seed)][1]
    test, oracle = load("digits", "test"), zoo.load("oracle_digits")
    x = sample_digits(net, test.y, 1.0, steps=steps, seed=seed)
    return frechet_report(oracle, x, load("digits", "train").x, test.x), class_accuracy(oracle, x, test.y), x


judged = run_arms(draw_and_judge, SAMPLERS, s.seeds, s.jobs)
distance = {key: torch.tensor([report.value for report, _, _ in results]) for key, results in judged.items()}
work = {key: key[1] * (full_work if key[0] == "full" else half_work) / 2e6 for key in judged}
for key, results in judged.items():
    hits = sum(accuracy for _, accuracy, _ in results) / len(results)
    print(
        f"{key[0]:13s}{key[1]:3d} steps {work[key]:6.0f} MMAC an image   Fréchet distance {distance[key].mean():6.3f}   read right {hits:6.1%}"
    )
print(judged["full", s.solver_steps][0][0])
run.record("half-steps", distance["distilled", s.solver_steps] / distance["full", half_steps])
run.record(
    "samples-scratch", distance["distilled", s.solver_steps] / distance["from scratch", s.solver_steps]
)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Top: four rows of ten digits, drawn by the full model with all solver steps, by the full model with half of them, by the distilled model, and by the model from scratch. The first three rows look alike; the digits of the last can hardly be read. Bottom: Fréchet distance against the work for an image, both on logarithmic axes: the line of the full model, which rises as it takes fewer steps; the two points of the distilled model, with fewer steps just above that line, with all of them clearly above; and those of the model from scratch far above."}, "figure": {"caption": "Samples, and what they cost. Top: the first sample of each class, first seed, not chosen. Bottom: Fréchet distance against the work for an image; points on a line differ in solver steps. Dotted: the floor. Bars: 90 % intervals over seeds.", "name": "fig-tinyfusion-samples"}}
fig, (top, bottom) = plt.subplots(2, 1, figsize=(6.6, 5), layout="constrained", height_ratios=(1.15, 1))
rows = [
    ("full", s.solver_steps),
    ("full", half_steps),
    ("distilled", s.solver_steps),
    ("from scratch", s.solver_steps),
]
first = [int((load("digits", "test").y == digit).nonzero()[0]) for digit in range(10)]
labels = [f"{arm}, {steps} steps" for arm, steps in rows]
show_images(torch.cat([judged[key][0][2][first] for key in rows]), 10, ax=top, row_labels=labels)
for arm, colour, style in (
    ("full", "0.35", "s--"),
    ("distilled", PALETTE[1], "o-"),
    ("from scratch", PALETTE[6], "^-"),
):
    keys = [key for key in judged if key[0] == arm]
    mean, low, high = mean_interval(torch.stack([distance[key] for key in keys], 1))
    bars = torch.stack([mean - low, high - mean]).clamp(max=0.9 * mean)
    bottom.errorbar(
        [work[key] for key in keys], mean, bars, fmt=style, ms=5, lw=1.4, color=colour, capsize=2, label=arm
    )
bottom.axhline(judged["full", s.solver_steps][0][0].floor, color="0.3", lw=1, ls=":")
bottom.set(xscale="log", yscale="log", xlabel="work for an image in MMAC", ylabel="Fréchet distance")
bottom.set_xticks([20, 50, 100, 200], ["20", "50", "100", "200"])
bottom.minorticks_off()
bottom.legend(fontsize=9)
plt.show()

# %% [markdown]
# ### In seconds
#
# Last, the time of a call with 64 images on one core, full and pruned in turn.

# %%
small, x = drop_blocks(model, candidates[0]), torch.zeros(64, 1, 8, 8, device=run.device)
arguments = (
    x,
    torch.full((64,), 500, device=run.device),
    torch.zeros(64, dtype=torch.long, device=run.device),
)


def call(net):
    with torch.no_grad():
        net(*arguments).sum().item()  # wait for the device


speeds = [ratio(lambda: call(model), lambda: call(small), repeats=5).ratio for _ in range(3)]
run.record("speed", speeds)
display(
    Markdown(
        f"Half of the blocks: {sum(speeds) / 3:.2f} times the speed, {saved['here']:.2f} times fewer operations."
    )
)

# %%
run.report()

# %% [markdown]
# **How to read the table.** The exact claims say that the machine is right: the draws keep what they should, a gate at a fixed mask is the pruned model, every logit learns, and half of the blocks is half of the work.
#
# **Is the choice good?** *Rank* and *mean* are confirmed: in every seed the search ends at the best of the 36. *Shortgpt* is **inconclusive**, and not in our favour. ShortGPT's free choice is slightly better in each seed, and the interval just touches 1. So the paper's wide lead over ShortGPT is not seen here. The likely reason is that the match is not fair: that score may keep any four blocks, and three of the first four, as ShortGPT keeps here, are out of reach for two groups of 2:4. Two controls were run for this. *Shortgpt-groups* binds both sides. It is confirmed as "not worse", but as a tie: ShortGPT in groups makes the very same choice in each seed. *One-group* frees both. Then TinyFusion keeps the first four blocks and is the best of all picks on the page, better than ShortGPT by the whole interval. ShortGPT spares the last block by rule, but in the first seed its printed scores would have kept it anyway.
#
# So on this model the groups cost more than the search gains over ShortGPT. And within the groups a score that takes one forward pass found what took the search nearly as much work as the recovery after it. Whether the first four blocks are the best of all 70 choices is not known: these were not enumerated. The section on {ref}`recovery <sec-tinyfusion-recovery>` uses the choice in groups, the paper's way, not the better one.
#
# **Is the update the reason?** *Update* is confirmed. Its control has the same gates, data and Gumbel values, but no $\Delta\Phi$. Look at {numref}`fig-tinyfusion-decisions` with it. Without the update the gates can only learn which mask does least harm at once, and they do end exactly at the greedy choice. With it they end elsewhere, and *greedy*, confirmed too, says that this was the better place. As both controls chose the same blocks, *update* and *greedy* are one measurement, not two. Every seed made the same choices, so these intervals show the noise of fine-tuning and not that of the search. In the first seed the second group was not settled when the search ended: block 7 is only a little more likely than not. The alternate choice, which needs no data, is about as good as the greedy one.
#
# *Forecast* asks whether this holds for the candidates in general, and is confirmed. Two warnings. Most of the order in {numref}`fig-tinyfusion-candidates` comes from one fact, whether block 0 stays, and any forecast that sees this fact gets a good correlation. The printed lines for the candidates that keep block 0 leave it out. Among these the calibration loss forecasts nothing, its correlation is even a little below 0; the short recovery still forecasts, though less well. (It sees the same first batches as the fine-tuning. That can help it only little, as one seed's order forecasts another's almost perfectly.) And the best candidates lie close together: a rank of 1 and a rank of 5 may differ by less than what a few more training steps change.
#
# **Recovery.** *Kd-steps* and *tune-scratch* compare at equal steps, as the paper does, and both are confirmed. *Kd-steps* tests the whole distillation loss; which of its terms helps was not taken apart. *Kd-cost* and *scratch-cost* compare at equal work. *Kd-cost* is **inconclusive**: distillation is ahead in each seed, but by less than the threshold asks on average, and the interval holds 1. The teacher's forward pass makes a distillation step dearer than a step of fine-tuning, by two thirds for a model of half the depth, so at equal work the rival trains for longer, and this eats up most of the lead. On the right of {numref}`fig-tinyfusion-recovery` distillation starts behind and catches up only towards the end. A longer run might part them; it was not tried at this profile. *Scratch-cost* and *samples-scratch* are confirmed, against a weak rival: in so few steps the model from scratch has not yet learned to draw digits, and its samples are read right hardly more often than by guessing. What the paper claims at the end of a long training, that less than 7 % of the original training is enough, is left untried.
#
# **Half of the steps.** *Half-steps* is **contradicted**. It is the plain rival: the same work for an image, and no pruning. The full model with half of the steps has a clearly lower Fréchet distance than the distilled model with all of them. Even with two steps, at about a sixth of the work, its mean distance is lower, though there the spread over seeds is wide. The likely reason: our digits are simple, and a second-order solver draws them in a handful of steps, as the line of the full model in {numref}`fig-tinyfusion-samples` shows. A small training of a halved model can hardly win against that. The two savings can be combined, since a pruned model too can take fewer steps. This was tried, with its second point in the figure. Its mean distance is then no worse, even lower, with intervals that overlap; but its mean still lies above the line of the full model. What a rival with fewer steps cannot do is to need less memory, or to be fast in a single step: there half of the blocks are nearly twice as fast (*speed*, confirmed).
#
# **Not tried** are *imagenet*, *masked-kd* and *other-models*: the paper's results on ImageNet, the gain from masking in a real distillation, and the other architectures.
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# - **Another network.** There is one base model. Seeds vary the search, the data order and the noise, so the intervals say nothing about another network, whose blocks may divide the work in another way.
# - **Depth at scale.** With eight blocks each one matters. Among DiT-XL's 28 blocks neighbours are probably more alike, so there is more to drop and less to tell them apart.
# - **Long recovery.** The order of the candidates is that after a short fine-tuning. After a long one they may move closer, or change places.
# - **Massive activations in a real model.** The rule for them was tested on made-up features. Whether masking them helps a distillation was not tried: this model has none.
# - **Other patterns.** Two groups of 2:4, and one of 4:8 as a control. The truth was enumerated for the former only.
# - **Left untried:** the Fréchet inception distances of the paper on ImageNet, its recovery over 500,000 steps, and its other models (MAR and SiT).
# :::
#
# ## Exercises
#
# **1.** The gradient of the draw is an approximation. Take one 2:4 group with equal logits and a cost for each mask. The true gradient of the mean cost is known. Compare it with the draw's, for several temperatures: how far off is its mean, and how much does it scatter?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
cost = torch.tensor([1.0, 0.2, 0.5, 0.9, 0.3, 0.1])  # of the six masks; one group, the draw by hand
logits = torch.zeros(6, requires_grad=True)
true = torch.autograd.grad((torch.softmax(100 * logits, 0) * cost).sum(), logits)[0]
noise = gumbel_noise((4000, 6), torch.Generator().manual_seed(3))
for temperature in (10.0, 4.0, 1.0, 0.3, 0.1):
    one_by_one = torch.stack(
        [
            torch.autograd.grad(
                (draw_masks(logits, torch.eye(6), row[None], temperature) @ cost).sum(), logits
            )[0]
            for row in noise[:600]
        ]
    )
    direction = F.cosine_similarity(one_by_one.mean(0), true, dim=0)
    print(
        f"temperature {temperature:4.1f}: cosine of mean and true gradient {direction:.3f}, "
        f"length {one_by_one.mean(0).norm() / true.norm():.2f}, scatter over length {one_by_one.std(0).norm() / one_by_one.mean(0).norm():.1f}"
    )
# Hot: the right direction, too short, little scatter. (Adam does not mind the length.) Cold: about the right length, drowned in
# scatter. So the schedule explores first, and at the end lets the draw be what it will be: nearly always the same mask.

# %% [markdown]
# **2.** The released code allows a different pattern in each group. Keep 16 of DiT-XL's 28 blocks with groups of four: which patterns are possible, how many candidates do they have, and what is the factor in MACs?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
# Seven groups whose N sum to 16: for example five of 2:4 and two of 3:4, as in the project's read-me.
hybrid = ((2, 4), (2, 4), (3, 4), (2, 4), (3, 4), (2, 4), (2, 4))
config = DIT_CONFIGS["DiT-XL/2"]
factor = dit_flops(config) / dit_flops({**config, "depth": sum(n for n, _ in hybrid)})
print(
    f"{sum(n for n, _ in hybrid)} blocks, {NMGates(hybrid).num_candidates:,} candidates, {factor:.2f} times fewer operations"
)
# Any N from 1 to 4 with sum 16 will do. The largest number of candidates is that of groups near 2:4, which have 6 masks each;
# 3:4 and 1:4 have 4, and 4:4 has 1.

# %% [markdown]
# **3.** The update $\Delta\Phi$ that was learned with the gates lowers the loss. Why is it thrown away? And why must it be *shared* by all masks?
#
# :::{dropdown} Solution 3: in words
# It was learned for the mixture of all masks that were drawn, mostly early ones that were later given up. For the chosen mask alone a fresh fine-tuning should be better, and starts from weights that were never bent for other masks. To keep it would be possible, and is a fair experiment; it was not tried here.
#
# An update for each mask would be {eq}`eq-tinyfusion-recoverable` to the letter. It would be as many trainings as there are masks, which is what the method avoids. The shared update sees each mask only now and then. So it learns what helps the *most likely* masks, and masks that share blocks help each other. The price: a mask that is unlike all others gets little help, and may be judged worse than it is.
# :::
#
# ## References
#
# The method: {cite:t}`tinyfusion`, with its code [VainF/TinyFusion](https://github.com/VainF/TinyFusion) (`models_with_layer_pruning.py`, `prune_by_learning.py`, `prune_by_score.py`, `train_masked_kd.py` and `diffusion/gaussian_diffusion.py` were read). Gates of this kind come from pruning single weights: {cite:t}`fang2024maskllm`. The rivals: {cite:t}`men2025shortgpt`, {cite:t}`kim2023bksdm`.
# The backbone: {cite:t}`peebles2023scalable`. Massive activations: {cite:t}`sun2024massive`. The library's parts: [minilib/pruning/depth.py](https://github.com/minilib-book/minilib/blob/main/minilib/pruning/depth.py), [minilib/distillation.py](https://github.com/minilib-book/minilib/blob/main/minilib/distillation.py).
