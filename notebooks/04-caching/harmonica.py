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
# # HarmoniCa: learn when each branch may rest
#
# A diffusion transformer adds two branches to its tokens in every block, attention and a feed-forward network. From one denoising step to the next most of them say almost the same thing. Which of them may repeat themselves, and when? {cite:t}`harmonica` learn the answer: a table with one number for each step and each branch.
# It is trained along the way that the sampler really takes, errors of the cache included, and weighed by what an error does to the final image.
#
# The network itself is not trained. The table is small, 320 numbers on this page, and it can be looked at: it is a barcode.

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
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown, display
from torch.utils.flop_counter import FlopCounterMode

from minilib import zoo
from minilib.arms import run_arms
from minilib.bench import times
from minilib.cache_plans import (
    BranchMacs,
    branch_macs,
    branch_names,
    cache_utilisation,
    follow_plan,
    interval_plan,
    keep_largest,
    key_step_plan,
    random_plan,
)
from minilib.cache_router import Router, soft_cache
from minilib.caching import equal_cost_steps
from minilib.costs import attention_flops, dit_flops, linear_flops
from minilib.data import load
from minilib.guidance import conditional
from minilib.intervene import trace_executions
from minilib.metrics import class_accuracy, features, frechet_distance, frechet_report
from minilib.models import DIT_CONFIGS, DiT
from minilib.plotting import PALETTE, image_grid, mean_interval, show_images, use_style
from minilib.profiling import to_meta
from minilib.reproduction import Reproduction
from minilib.sampling import initial_noise, sample, sample_final
from minilib.schedulers import DPMSolverMultistepScheduler


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # each trains routers of its own, and has noise of its own
    steps: int  # of the sampler
    trajectories: int  # that a router is trained on
    batch: int  # images of each
    lr: float  # of the logits
    tables: int  # how often the weights of the steps are measured
    table_noises: int  # images that they are measured on
    noises: int  # images that a plan is judged on, a seed
    random: int  # random plans a seed
    exact_steps: int  # of the near-exact solution
    watched: int  # images whose errors are followed along the way
    timed: int  # images of the timing
    jobs: int  # processes


run = Reproduction(
    "harmonica",
    profile,
    {
        "smoke": Settings((0,), 8, 3, 2, 0.8, 1, 2, 8, 1, 12, 4, 2, 1),
        "cpu": Settings((0, 1, 2), 20, 66, 2, 0.2, 3, 12, 86, 3, 40, 16, 16, 2),
        "gpu": Settings((0, 1, 2, 3, 4), 20, 1000, 16, 0.02, 20, 64, 1000, 5, 100, 256, 256, 1),
    },
)
s = run.settings
use_style()
run.show_card()

# %% [markdown]
# ## Settings
#
# The model is this book's class-conditional diffusion transformer of handwritten digits, 8 by 8 pixels. It is built like DiT {cite:p}`peebles2023scalable`, the backbone of the paper's first experiments: 8 blocks with adaptive layer norm, so 16 branches, on 64 tokens. It predicts the noise $\epsilon$.
#
# The sampler is DDIM {cite:p}`song2021denoising` with 20 steps, without randomness and without guidance. (We write it as DPM-Solver++ of order one, which is the same formula {cite:p}`lu2022dpm`. This network's noise schedule begins with almost no signal, where a tiny error of $\hat\epsilon$ is a huge one of the image; so the sampler starts at the value
# that Lu and co-authors recommend for this schedule, see {doc}`/notebooks/00-foundations/model-zoo`.) A seed stands for the training of the routers and for the noise and the classes on which they are judged. All arms of a seed share both.

# %%
run.show_settings()

# %% [markdown]
# (sec-harmonica-idea)=
# ## The idea
#
# In block $i$ of a DiT, the tokens $h$ pass through two branches,
#
# $$
# h \leftarrow h + g_a\, o_a, \qquad h \leftarrow h + g_m\, o_m ,
# $$ (eq-harmonica-block)
#
# where $o_a$ comes from attention, $o_m$ from the feed-forward network, and the gates $g_a$, $g_m$ are computed from the time and the class. The cache keeps $o_a$ and $o_m$. Gates and sums are nearly free; they always belong to the present step.
#
# A **plan** says, for each step $t$ and each branch $i$, whether the branch computes (and is kept), or rests, and what was kept last is used again. With $T$ steps and $L$ blocks it is a matrix of $T \times 2L$ zeros and ones. In the first step nothing is kept yet, so the first row is all ones; that leaves $2^{2L(T-1)}$ plans. How to choose?
#
# A simple plan, FORA {cite:p}`selvaraju2024fora`, computes all branches in every $N$th step and none in between. Learning-to-Cache {cite:p}`ma2024learning`, L2C for short, makes the matrix soft and trains it. A **router** holds a logit $p_{t,i}$, and $r = \sigma(p)$, the logistic function of it, lies between 0 and 1. In training each branch computes, and hands on
#
# $$
# o = r_{t,i}\; o^{\text{new}} + (1 - r_{t,i})\; o^{\text{kept}} .
# $$ (eq-harmonica-mix)
#
# That is differentiable. At inference $r$ is cut by a threshold: above it the branch computes, below it rests. The loss asks for two things, a small error of the predicted noise and a small sum of all $r$:
#
# $$
# \mathcal{L}_t = \lambda_t\, \lVert \hat\epsilon_{\text{router}} - \hat\epsilon_{\text{full}} \rVert^2 + \beta \sum_i r_{t,i} ,
# $$ (eq-harmonica-loss)
#
# with $\lambda_t = 1$ in L2C. Here $\hat\epsilon_{\text{full}}$ is what the network says without a cache. $\beta$ is a price: a branch computes where that is worth more than $\beta$.
#
# HarmoniCa finds two discords between this training and the later use, and removes both.
#
# 1. **The way.** L2C trains each step alone: a clean noisy image, and a cache filled by the *full* network one step before. At inference the image carries the errors of all earlier steps, and, unless all branches compute in every second step as in L2C's own sampler, what is kept may be old. HarmoniCa's *step-wise denoising training* (SDT) starts from noise and runs the whole sampler, in order, with the router in it. Each step trains on
#    the state that the router has brought about. It needs no training images.
# 2. **The goal.** What counts is the final image, not the predicted noise in each step. A small error early may spoil the image, a larger one may vanish. HarmoniCa's *image error proxy* (IEPO) sets $\lambda_t$ to what the cache of step $t$ does to the final image. It is measured from time to time: $x_0^{(t)}$ is the image if the cache is used in all steps up to $t$, and all later steps compute;
#
# $$
# \lambda_t = \operatorname{mean} \bigl( x_0^{(t)} - x_0^{(t-1)} \bigr)^2 .
# $$ (eq-harmonica-lambda)
#
# The trivial rival needs no idea at all: fewer steps of the same sampler. And a plan that is drawn at random costs the same as a learned one.

# %%
# NBVAL_CHECK_OUTPUT
model = zoo.load("dit_digits").requires_grad_(False).to(run.device)
NAMES = branch_names(model)
print(len(NAMES), "branches:", *NAMES[:4], "...", NAMES[-1])

# %% [markdown]
# (sec-harmonica-method)=
# ## The method
#
# ### A plan and what it costs
#
# The library can make named parts of a model hand out what they computed earlier. `follow_plan` does that for the branches, by the rows of a plan; a branch that rests is not called at all. First the formulas. Attention on $n$ tokens of width $d$ has four projections and two products, $4 n d^2 + 2 n^2 d$ multiply-accumulates (MACs); the feed-forward
# network, four times as wide inside, has $8 n d^2$. All else (embeddings, gates, the last layer) always runs. If $c_i$ is the cost of branch $i$, $c_0$ that of the rest, and $m_{t,i} \in \{0, 1\}$ the plan, the sampler costs
#
# $$
# T c_0 + \sum_{t,i} m_{t,i}\, c_i .
# $$ (eq-harmonica-cost)


# %%
def costs_by_hand(config):
    """MACs of one image: of each branch, and of the rest, from the formulas."""
    n, d = (config["input_size"] // config["patch_size"]) ** 2, config["hidden_size"]
    attention = (linear_flops(n, d, 4 * d) + attention_flops(1, 1, n, n, d)) // 2
    feed_forward = linear_flops(n, d, 8 * d) // 2
    branches = (attention, feed_forward) * config["depth"]
    return BranchMacs(branches, dit_flops(config) // 2 - sum(branches))


T, B = s.steps, len(NAMES)
MACS = costs_by_hand(model.config)
print(
    f"a call: {sum(MACS.branches) + MACS.rest:,} MACs an image; attention {MACS.branches[0]:,}, feed-forward {MACS.branches[1]:,}"
)
print(f"all that always runs: {MACS.rest / (sum(MACS.branches) + MACS.rest):.1%}")

# %% [markdown]
# ### The sampler


# %%
def solver(order=1):
    """Order 1 is DDIM; order 2 is used once, for the near-exact solution."""
    return DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", solver_order=order, lambda_min_clipped=-5.1
    )


def start(n, generator):
    """Noise and classes for n images."""
    x = initial_noise((n, 1, 8, 8), generator, device=run.device)
    return x, torch.randint(10, (n,), generator=generator).to(run.device)


def draw(plan, x, y, solve=solver):
    """Images of the sampler that follows ``plan``."""
    with torch.no_grad(), follow_plan(model, NAMES, plan):
        return sample_final(conditional(model, y), solve(), x, num_inference_steps=len(plan))


def everything(steps):
    return interval_plan(steps, B, 1)


def predicted_noise(x, t, y):
    return model(x, t.expand(len(x)), y)[
        :, :1
    ]  # the second channel is a variance, for samplers with randomness


# %% [markdown]
# ### The weights of the steps (IEPO)
#
# Equation {eq}`eq-harmonica-lambda` asks for $T$ samplings, and the released code does them one after the other. But $x_0^{(t)}$ and $x_0^{(t-1)}$ share all steps before $t$. So we run the router's trajectory once, and at each step let a copy leave it, which then goes on without a cache. All copies that are under way take their next step in one batch. That is
# $T (T + 1) / 2$ calls in place of $T^2$, and the same result; we check it below.


# %%
@torch.no_grad()
def image_error(weights, cache, x, y):
    """lambda_t of equation (4), without normalisation; of the first step, in which all is computed, it is 0."""
    copies, steps = x[:0], solver()
    steps.set_timesteps(len(weights))
    cache.clear()
    for i, t in enumerate(steps.timesteps):
        cache.weights = weights[i]
        predictions = [predicted_noise(x, t, y)]
        cache.weights = None  # the plain network: the cache is neither read nor written
        if i:
            predictions.insert(0, predicted_noise(copies, t, y.repeat(i)))
        copies = steps.step(torch.cat(predictions), t, torch.cat([copies, x])).prev_sample
        x = copies[-len(y) :]  # the router's trajectory goes on from here, and so does the newest copy
    images = copies.unflatten(0, (len(weights), len(y)))
    change = (images[1:] - images[:-1]).square().flatten(1).mean(1)
    return torch.cat([torch.zeros_like(change[:1]), change]), images


# %% [markdown]
# ### Training the router (SDT)
#
# One trajectory trains all rows. The gradient of $\mathcal{L}_t$ reaches row $t$ only, since what is kept is cut from the graph. And row $t$ is used at step $t$ only. So one update after the whole trajectory is exactly what the released code does with an update after each step.
#
# Without SDT, in the manner of L2C, two things change: the sampler moves on with the *full* prediction, and the cache holds what the *full* network computed one step before. All else is equal: the same noise, the same order, the same number of calls. (L2C itself starts from noised training images. A trajectory of the full sampler has the same role here.)
#
# The arm is not L2C itself. As we read [horseee/learning-to-cache](https://github.com/horseee/learning-to-cache/blob/main/DiT/models/dynamic_models.py), its DiT sampler computes all branches in every second step, and the router decides only in the steps between; so what is kept is never older than one step. HarmoniCa's released sampler has no such rule. Neither has our *L2C-style* arm: it is HarmoniCa without its two
# ideas, used as HarmoniCa is used. At half of the branches at rest, L2C's rule leaves one plan only, the uniform one with $N = 2$.
#
# What about $\beta$? It decides how many branches rest, and the methods have to be compared at equal numbers. The paper tunes it by hand. We let the price follow the goal instead. To compute where one could rest is worth $v = -\partial (\lambda \lVert\cdot\rVert^2) / \partial r \,/\, (1 - r)$, averaged over the latest trajectories. The optimum of the loss
# in $r$ is about $1 - \beta / v$, and it is under the threshold 0.1 where $v < \beta / 0.9$. So $\beta$ is set to 0.9 times the value of $v$ below which the wanted share of branches lies.


# %%
class Training(NamedTuple):
    sdt: bool
    iepo: bool


TRAININGS = {
    "HarmoniCa": Training(True, True),
    "SDT only": Training(True, False),
    "L2C-style": Training(False, False),
}


def train(how, seed, goal=0.5):
    """A router, and what its training measured: the weights of the steps, and the share that rests after each trajectory."""
    generator = torch.Generator().manual_seed(1000 + seed)
    router = Router(T, B).to(run.device)
    optimiser = torch.optim.AdamW(router.parameters(), lr=s.lr, weight_decay=0, betas=(0.9, 0.99))
    step_weights, tables, resting, worth = torch.ones(T), [], [], None
    with soft_cache(model, NAMES, threshold=router.threshold) as cache:
        for trajectory in range(s.trajectories):
            if how.iepo and trajectory % -(-s.trajectories // s.tables) == 0:
                table, _ = image_error(router.weights().detach(), cache, *start(s.table_noises, generator))
                step_weights = table / table[1:].mean()  # mean 1: the scale is left to beta
                tables.append(table.cpu())
            x, y = start(s.batch, generator)
            weights, steps = router.weights(), solver()
            r = weights.detach().requires_grad_()
            steps.set_timesteps(T)
            cache.clear()
            for i, t in enumerate(steps.timesteps):
                cache.weights = r[i]
                routed = predicted_noise(x, t, y)
                cache.weights = (
                    None if how.sdt else torch.ones_like(r[i])
                )  # ones: refill the cache with this step's
                with torch.no_grad():
                    full = predicted_noise(x, t, y)
                if i:
                    (step_weights[i] * (routed - full).square().mean()).backward()
                x = steps.step(routed.detach() if how.sdt else full, t, x).prev_sample
            slope = r.grad[1:]
            gain = (-slope / (1 - r[1:]).detach()).clamp(min=0)
            worth = gain if worth is None else 0.8 * worth + 0.2 * gain
            beta = 0.9 * worth.quantile(goal * T / (T - 1))
            weights[1:].backward(slope + beta)
            optimiser.step()
            optimiser.zero_grad()
            router.clamp_()
            resting.append(cache_utilisation(router.plan()))
    return {"weights": router.weights().detach().cpu(), "tables": tables, "resting": resting}


# %% [markdown]
# All routers begin at $r = 0.88$ everywhere, as the model that computes nearly all, and are pruned from there. The released code begins with logits drawn at random. That is a random plan, and ours is a short training.
#
# The threshold of the released code is 0.1. To compare plans that rest equally often we move the threshold, per router, until exactly the wanted number of entries is below it.
#
# :::{admonition} In the released code
# :class: tip
# As we read [ModelTC/HarmoniCa](https://github.com/ModelTC/HarmoniCa), what the text leaves open is settled so. What is kept in training is the *mixture* $o$, not $o^{\text{new}}$, and only where $r$ is above the threshold; elsewhere what was kept stays
# ([`models/router_models.py`](https://github.com/ModelTC/HarmoniCa/blob/main/models/router_models.py)); we do the same. The weights stay soft in the training and in the table of $\lambda_t$, and are cut only in the sampler. The error compares all output channels, the predicted variance included; ours compares the noise. The cache is cleared before a table, but not before
# each trajectory of the training ([`train_router.py`](https://github.com/ModelTC/HarmoniCa/blob/main/train_router.py)): the first row's logits are 5, so a first step would mix in 0.7 % of what the trajectory before has left. Here a trajectory begins with an empty cache, and the first row is 1.
# :::
#
# ### Is it what we say it is?
#
# A plan of ones must be the plain sampler, bit for bit, and so must soft weights of one. Soft weights that are 0 or 1 must give what the hard plan gives. What runs, counted by hooks, must be the plan. A branch that rests must execute nothing, not one operation. The cost must be that of the formula, here and at the size of DiT-XL/2. And the shared trajectories must give the same
# images as separate samplings.

# %%
check = torch.Generator().manual_seed(7)
x, y = start(2, check)
plans = [random_plan(T, B, k, check) for k in (T * B // 4, T * B // 2, 3 * T * B // 4)]
plain = sample_final(conditional(model, y), solver(), x, num_inference_steps=T)


def softly(rows):
    """The sampler with soft weights, one row a step."""
    with soft_cache(model, NAMES) as cache, torch.no_grad():
        queue = iter(rows.to(run.device))

        def predict(x, t):
            cache.weights = next(queue)
            return model(x, t, y)

        return sample_final(predict, solver(), x, num_inference_steps=len(rows))


ones = everything(T)
run.record("all-ones", max(float((v - plain).abs().max()) for v in (draw(ones, x, y), softly(ones.float()))))
run.record("soft-is-hard", max(float((draw(p, x, y) - softly(p.float())).abs().max()) for p in plans))


def film(plan, x, y):
    """What really ran, (steps, branches), and the clean image that each step aims at."""
    ran, aims, before = [], [], 0
    with trace_executions(model, list(NAMES)) as trace, follow_plan(model, NAMES, plan):
        for step in sample(conditional(model, y), solver(), x, num_inference_steps=len(plan)):
            ran.append([name in trace.order[before:] for name in NAMES])
            aims.append(step.pred_original_sample.clamp(-1, 1).cpu())
            before = len(trace.order)
    return torch.tensor(ran), torch.stack(aims)


def rests(plan, ghost, *inputs):
    """MACs of a whole sampler on the meta device, and those inside branches in steps in which they are to rest."""
    total = resting = 0
    with torch.no_grad(), follow_plan(ghost, NAMES_OF[ghost], plan):
        for row in plan.tolist():
            with FlopCounterMode(display=False) as counter:
                ghost(*inputs)
            inside = counter.get_flop_counts()
            idle = [f"DiT.{name}" for name, on in zip(NAMES_OF[ghost], row, strict=True) if not on]
            resting += sum(sum(inside[name].values()) for name in idle if name in inside) // 2
            total += counter.get_total_flops() // 2
    return total, resting


with torch.device("meta"):
    xl = DiT(**DIT_CONFIGS["DiT-XL/2"])
small, XL = to_meta(model), costs_by_hand({"patch_size": 2} | DIT_CONFIGS["DiT-XL/2"])
NAMES_OF = {small: NAMES, xl: branch_names(xl)}
miscounted, idle_macs = [], 0
for ghost, side, channels, known in ((small, 8, 1, MACS), (xl, 32, 4, XL)):
    inputs = torch.zeros(1, channels, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    inputs = tuple(v.to("meta") for v in inputs)
    miscounted.append(int(branch_macs(ghost, NAMES_OF[ghost], *inputs) != known))
    for share in (0.0, 0.3, 0.6):
        plan = random_plan(4, len(known.branches), int(share * 4 * len(known.branches)), check)
        counted, idle = rests(plan, ghost, *inputs)
        miscounted.append(abs(counted - known.of(plan)))
        idle_macs += idle
run.record("macs", max(miscounted))
run.record("rests", idle_macs)

soft = torch.rand(T, B, generator=check)
soft[0] = 1.0
with soft_cache(model, NAMES) as cache:
    _, shared = image_error(soft.to(run.device), cache, x, y)
apart = [softly(torch.where(torch.arange(T)[:, None] <= k, soft, 1.0)) for k in (0, T // 2, T - 1)]
run.record(
    "shared-trajectories",
    max(float((a - shared[k]).abs().max()) for a, k in zip(apart, (0, T // 2, T - 1), strict=True)),
)

# %%
# NBVAL_CHECK_OUTPUT
print("operations in branches that rest:", idle_macs)
print("counted = by hand, here and for DiT-XL/2:", "PASS" if max(miscounted) == 0 else miscounted)
for name, known in (("this page's model", MACS), ("DiT-XL/2, 256 pixels", XL)):
    call = sum(known.branches) + known.rest
    print(f"{name}: {call / 1e6:,.0f} MMAC a call, {known.rest / call:.2%} of them outside the branches")
    for share in (0.2, 0.3, 0.35, 0.5):
        even = 1 / (1 - share * sum(known.branches) / call)
        print(f"  {share:.0%} of the branches rest, both kinds alike: {even:.2f}x fewer operations")

# %% [markdown]
# So the share of entries that rest, the *cache utilisation ratio* (CUR), fixes the saving almost alone. The paper's 1.44 times for DiT-XL/2 takes a CUR of about 0.31. Its other headline, 2.07 times, belongs to another model (PixArt-$\alpha$, with cross-attention); in DiT-XL/2 it would take a CUR of 0.52.
#
# (sec-harmonica-experiment)=
# ## The experiment
#
# We train the routers, cut them at three CUR (0.31, the paper's factor of 1.44; 0.5; 0.65), and sample. All images are compared with those of the same sampler without a cache, from the same noise: the mean squared error of pixels between $-1$ and 1. It is the paper's image error.
#
# :::{table} The arms. At equal CUR all plans rest equally often; a rival with fewer steps may use at least as many operations as the plan that it is compared with.
# :name: tab-harmonica-arms
#
# | arm | what is different | question |
# |---|---|---|
# | HarmoniCa | SDT and IEPO | the method |
# | SDT only | $\lambda_t = 1$ | does the weight of the steps matter? |
# | L2C-style (not L2C's own sampler, see above) | $\lambda_t = 1$, and each step trained alone on the clean way | does the way matter? |
# | random | a plan drawn at random | is anything learned at all? |
# | moved in time | the learned plan; each branch's column (but the first entry) shuffled | is *when* what was learned? |
# | moved across branches | the learned plan; each row shuffled | is *which branch* what was learned? |
# | whole steps | the steps in which the learned router computes most, all branches in them | does the pattern within a step matter? (in part: these steps also lie in clusters) |
# | uniform | all branches, every 2nd, 3rd, 4th step (FORA) | does learning beat counting to two? |
# | fewer steps | DDIM, as many steps as the operations allow, rounded up | the trivial rival |
# | near-exact | a second-order solver with many steps | how near is the reference itself to the truth? |
# :::
#
# *Near-exact* guards against a trap. Fewer DDIM steps and the reference are the same first-order method, and share a part of their error. Measured against the reference, fewer steps look better than they are. So we also measure against the solution that both approximate.

# %%
REUSED = {"0.31": round(0.3125 * T * B), "0.50": T * B // 2, "0.65": min(round(0.65 * T * B), (T - 1) * B)}
routers = run_arms(train, TRAININGS, s.seeds, s.jobs)


def learned(name, seed, reused):
    return keep_largest(routers[name][s.seeds.index(seed)]["weights"], reused)


def shuffled(plan, generator, dim):
    """Each row (dim 1) of the plan shuffled, or each column (dim 0); the first row stays."""
    order = torch.rand(plan[1:].shape, generator=generator).argsort(dim)
    return torch.cat([plan[:1], plan[1:].gather(dim, order)])


def whole_steps(weights, reused):
    """As many whole steps as ``reused`` allows to compute: those with the largest sums of weights, and the first."""
    keys = T - reused // B
    return key_step_plan(T, B, [0, *(weights[1:].sum(1).argsort(descending=True)[: keys - 1] + 1).tolist()])


def plan_of(name, seed):
    """The plan of an arm and a seed."""
    kind, _, number = name.partition(" @ ")
    kind, _, copy = kind.partition(" #")
    generator = torch.Generator().manual_seed(5000 + 100 * seed + int(copy or 0))
    if kind == "random":
        return random_plan(T, B, REUSED[number], generator)
    if kind == "uniform":
        return interval_plan(T, B, int(number))
    if kind == "DDIM":
        return everything(int(number))
    mine = learned("HarmoniCa" if kind not in TRAININGS else kind, seed, REUSED[number])
    if kind == "whole steps":
        return whole_steps(routers["HarmoniCa"][s.seeds.index(seed)]["weights"], REUSED[number])
    return {"moved in time": shuffled(mine, generator, 0), "moved across": shuffled(mine, generator, 1)}.get(
        kind, mine
    )


def cost(plan):
    """In calls of the full network."""
    return MACS.of(plan) / MACS.of(everything(1))


ARMS = [f"HarmoniCa @ {c}" for c in REUSED] + [
    f"{k} @ 0.50" for k in ("SDT only", "L2C-style", "whole steps")
]
ARMS += [f"moved {how} @ 0.50" for how in ("in time", "across")] + [f"uniform @ {N}" for N in (2, 3, 4)]
ARMS += [f"random #{k} @ 0.50" for k in range(s.random)] + ["random #0 @ 0.31", "random #0 @ 0.65"]
RIVAL = {  # of each arm and seed: DDIM with as many steps as its operations allow, rounded up
    (name, seed): f"DDIM @ {equal_cost_steps(cost(plan_of(name, seed)), 1.0)}"
    for name in ARMS
    if name.split()[0] in ("HarmoniCa", "uniform") or name == "random #0 @ 0.50"
    for seed in s.seeds
}
ARMS += [f"DDIM @ {T}", "exact", *sorted(set(RIVAL.values()))]


def judged(name, seed):
    """The images of an arm and seed, on the noise of the seed."""
    x, y = start(s.noises, torch.Generator().manual_seed(seed))
    if name == "exact":
        return draw(everything(s.exact_steps), x, y, lambda: solver(2)).clamp(-1, 1).cpu()
    return draw(plan_of(name, seed), x, y).clamp(-1, 1).cpu()


images = run_arms(judged, dict(zip(ARMS, ARMS, strict=True)), s.seeds, s.jobs)

# %% [markdown]
# ## Results
#
# ### The picture: the barcode
#
# {numref}`fig-harmonica-barcode` is not drawn from the plan but recorded: a hook on each branch noted whether it computed.

# %%
seed = s.seeds[0]
x, y = start(1, torch.Generator().manual_seed(seed))
shown = {
    "HarmoniCa": plan_of("HarmoniCa @ 0.50", seed),
    "L2C-style": plan_of("L2C-style @ 0.50", seed),
    "uniform, $N = 2$": plan_of("uniform @ 2", seed),
    "random": plan_of("random #0 @ 0.50", seed),
}
codes, aims = {}, {}
for name, plan in shown.items():
    codes[name], aims[name] = film(plan, x, y)
of_all = [plan_of(name, k) for name in ARMS if "DDIM" not in name and name != "exact" for k in s.seeds]
recorded = [code != plan for code, plan in zip(codes.values(), shown.values(), strict=True)]
run.record("counted", sum(int(wrong.sum()) for wrong in recorded))
low = Router(T, B)
torch.nn.init.constant_(low.logits, -low.limit)
run.record("first-row", sum(int((~plan[0]).sum()) for plan in (*of_all, low.plan())))

# %%
# NBVAL_CHECK_OUTPUT
print("entries of the barcodes that are not in the plans:", sum(int(wrong.sum()) for wrong in recorded))
print(
    "CUR by hooks = CUR of the plan:",
    all(cache_utilisation(codes[k]) == cache_utilisation(shown[k]) for k in codes),
)
print("branches that rest in step 0, all plans:", sum(int((~plan[0]).sum()) for plan in of_all))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four barcodes, 16 branches by the steps of the sampler, black where a branch computes; half of each is black. HarmoniCa: a solid black block in the middle, black again in the last steps, short broken pieces before the block, and nearly white columns between. L2C-style: black is crowded at the late end, with thin horizontal lines before. Uniform: every second column black. Random: salt and pepper. Below: one digit as each step aims at it, from a blur to a clear digit."}, "figure": {"caption": "The picture to remember. Each barcode is a plan in which half of the entries rest; black: the branch computes. Columns are steps, rows are branches from the input, at the top, to the output: attention and feed-forward network of each block in turn. Recorded by hooks, first seed. Below: the clean image that the sampler with HarmoniCa's plan aims at in each step. One digit, not chosen.", "name": "fig-harmonica-barcode"}}
fig, axes = plt.subplots(5, 1, figsize=(7, 6.6), height_ratios=(1.9, 1.9, 1, 1, 0.33), layout="constrained")
for ax, (name, code) in zip(axes, codes.items(), strict=False):
    ax.imshow(
        code.T, cmap="gray_r", vmin=0, vmax=1, aspect="auto", extent=(0, T, B, 0), interpolation="nearest"
    )
    ax.vlines(range(1, T), 0, B, color="0.8", lw=0.4)
    ax.set(xticks=[i + 0.5 for i in range(T)], yticks=[])
    ax.set_xticklabels([])
    ax.set_ylabel(name, rotation=0, ha="right", va="center")
    ax.grid(False)
strip = image_grid(aims["HarmoniCa"][:, 0], T, pad=0).numpy()
axes[-1].imshow(strip, vmin=0, vmax=1, aspect="auto", extent=(0, T, 1, 0))
axes[-1].set(xticks=[i + 0.5 for i in range(T)], yticks=[], xlabel="step (0 is the noisiest)")
axes[-1].set_xticklabels(range(T))
axes[-1].set_ylabel("aim", rotation=0, ha="right", va="center")
axes[-1].grid(False)
plt.show()

# %% [markdown]
# ### Nearness against cost


# %%
def error(name, reference):
    """Mean squared error of an arm's images to those of a reference, one number a seed."""
    pairs = zip(images[name], images[reference], strict=True)
    return torch.tensor([float((a - b).square().mean()) for a, b in pairs])


REFERENCE = f"DDIM @ {T}"
to_full = {name: error(name, REFERENCE) for name in images if name != REFERENCE}
to_exact = {name: error(name, "exact") for name in images if name != "exact"}


def rival(name, errors):
    """The errors of the rival with fewer steps; it may differ from seed to seed."""
    return torch.stack([errors[RIVAL[name, seed]][k] for k, seed in enumerate(s.seeds)])


for errors in (to_full, to_exact):
    errors["random @ 0.50"] = torch.stack([errors[f"random #{k} @ 0.50"] for k in range(s.random)]).mean(0)
    errors |= {f"random @ {c}": errors[f"random #0 @ {c}"] for c in ("0.31", "0.65")}
mine = to_full["HarmoniCa @ 0.50"]
run.record("learned-random", mine / to_full["random @ 0.50"])
run.record("uniform", mine / to_full["uniform @ 2"])
run.record("uniform-n3", to_full["HarmoniCa @ 0.65"] / to_full["uniform @ 3"])
run.record("fewer-steps", mine / rival("HarmoniCa @ 0.50", to_full))
run.record("fewer-steps-31", to_full["HarmoniCa @ 0.31"] / rival("HarmoniCa @ 0.31", to_full))
run.record("uniform-fewer-steps", to_full["uniform @ 2"] / rival("uniform @ 2", to_full))
run.record("random-fewer-steps", to_full["random @ 0.50"] / rival("random #0 @ 0.50", to_full))
run.record("learned-random-31", to_full["HarmoniCa @ 0.31"] / to_full["random @ 0.31"])
run.record("exact-fewer-steps", to_exact["HarmoniCa @ 0.50"] / rival("HarmoniCa @ 0.50", to_exact))
run.record("exact-uniform", to_exact["uniform @ 2"] / rival("uniform @ 2", to_exact))
run.record("no-sdt", to_full["L2C-style @ 0.50"] / to_full["SDT only @ 0.50"])
run.record("no-iepo", to_full["SDT only @ 0.50"] / mine)
run.record("when", to_full["moved in time @ 0.50"] / mine)
run.record("which", to_full["moved across @ 0.50"] / mine)
run.record("whole-steps", to_full["whole steps @ 0.50"] / mine)
calls = {
    name: sum(cost(plan_of(name, k)) for k in s.seeds) / len(s.seeds)
    for name in to_full
    if name in ARMS and name != "exact"
}
calls |= {f"random @ {c}": calls[f"random #0 @ {c}"] for c in REUSED}
print(f"{'arm':22s} {'calls':>6s} {'MSE to DDIM-' + str(T):>15s} {'MSE to the solution':>20s}")
for name in sorted(calls, key=calls.get):
    if "#" not in name and name != REFERENCE:
        print(f"{name:22s} {calls[name]:6.2f} {to_full[name].mean():15.5f} {to_exact[name].mean():20.5f}")
print(f"{REFERENCE:22s} {T:6.2f} {'':15s} {to_exact[REFERENCE].mean():20.5f}")


# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels, mean squared error on a logarithmic axis against cost in calls. All lines fall as the cost grows. Left, to the full sampler; right, to the near-exact solution, with a dotted line for the error of the full sampler itself. Lines: random plans, grey; fewer DDIM steps, black and dashed; uniform plans, green; HarmoniCa, blue; single marks for SDT only, L2C-style and whole steps at half of the cost."}, "figure": {"caption": "Image error against cost. Left: to DDIM with all its steps, the sampler that the cache imitates. Right: to the near-exact solution; dotted: DDIM with all its steps. Cost in calls of the full network, from the counted operations. Bars: 90 % intervals over seeds, cut below at a third of the mean. The claims compare ratios seed by seed, on the same noise, so bars that overlap do not settle them. The random point at half of the cost is the mean of several plans a seed, the others are one plan. The vertical axes are logarithmic and differ.", "name": "fig-harmonica-pareto"}}
def by_cost(kind):
    return sorted(
        (name for name in calls if name.startswith(kind) and "#" not in name and name != REFERENCE),
        key=calls.get,
    )


LINES = {
    "random plans": (by_cost("random"), PALETTE[6], "v-"),
    "DDIM, fewer steps": (by_cost("DDIM"), "k", "s--"),
    "uniform, $N = 4, 3, 2$": (by_cost("uniform"), PALETTE[2], "o-"),
    "HarmoniCa": (by_cost("HarmoniCa"), PALETTE[0], "o-"),
    "SDT only": (["SDT only @ 0.50"], PALETTE[5], "D"),
    "L2C-style": (["L2C-style @ 0.50"], PALETTE[3], "D"),
    "whole steps": (["whole steps @ 0.50"], PALETTE[4], "D"),
}
fig, axes = plt.subplots(1, 2, figsize=(7, 4.0), layout="constrained")
for ax, errors in zip(axes, (to_full, to_exact), strict=True):
    for label, (names, colour, style) in LINES.items():
        mean, low, high = mean_interval(torch.stack([errors[name] for name in names], dim=1))
        bars = torch.stack([mean - low.clamp(min=mean / 3), high - mean])
        where = [calls[name] for name in names]
        ax.errorbar(where, mean, bars, fmt=style, ms=5, lw=1.3, color=colour, label=label, capsize=2)
    ax.set(xlabel=f"cost in calls (DDIM: {T})", yscale="log")
axes[0].set(ylabel="mean squared error", title=f"to DDIM, {T} steps")
axes[1].axhline(float(to_exact[REFERENCE].mean()), color="0.3", lw=1, ls=":")
axes[1].set(title="to the near-exact solution")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=4, fontsize=9)
plt.show()

# %% [markdown]
# ### What the steps are worth
#
# {numref}`fig-harmonica-lambda` shows the weights $\lambda_t$ that the image error proxy measures, and how the share of resting branches grows during the training. Nothing rests at first: all logits begin far above the threshold, and have to fall to it.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Left: the weight of each step on a logarithmic axis, one line for each table, from light, the first, to dark, the last; the lines differ much, and rise where others fall. Right: share of entries that rest against the trajectory, rising from 0 to about the goal, one half, for three trainings."}, "figure": {"caption": "Left: $\\lambda_t$, normalised to mean 1; pale to dark: from the first table of a training to the last; first seed; a weight of 1 everywhere is what the arms without IEPO have. Right: the share of entries under the threshold 0.1 during the training, mean over seeds; dashed: the goal.", "name": "fig-harmonica-lambda"}}
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.9), layout="constrained")
tables = routers["HarmoniCa"][0]["tables"]
for k, table in enumerate(tables):
    left.plot(
        range(1, T), (table / table[1:].mean())[1:], "o-", ms=3, color=PALETTE[0], alpha=(k + 1) / len(tables)
    )
left.axhline(1, color="0.3", lw=1, ls=":")
left.set(xlabel="step", ylabel=r"$\lambda_t$ / mean", yscale="log")
for name, colour in zip(TRAININGS, (PALETTE[0], PALETTE[5], PALETTE[3]), strict=True):
    path = torch.tensor([router["resting"] for router in routers[name]]).mean(0)
    right.plot(range(1, s.trajectories + 1), path, color=colour, label=name)
right.axhline(0.5, color="0.3", lw=1, ls="--")
right.set(xlabel="trajectory", ylabel="share that rests", ylim=(0, 1))
right.legend(fontsize=9)
plt.show()

# %% [markdown]
# ### The two discords, measured
#
# How far is L2C's training from the use of its router? Take a plan, and compare the error of the predicted noise in two situations. *Single step*: the image is clean, the cache was filled by the full network one step before; this is what L2C's router is trained on. *Real*: the sampler follows the plan from the start. There the error has two parts. The cache is old, and the image has
# gone astray. The first part alone is the error against what the full network says of the *same* image. The parts need not add up: they may cancel in part, and then the whole is less than the first.


# %%
@torch.no_grad()
def along_the_way(plan, seed):
    """Mean squared error of the predicted noise at each step, in three situations: (3, steps)."""
    x0, y = start(s.watched, torch.Generator().manual_seed(2000 + seed))

    def walk(real):
        x, said, steps = x0, [], solver()
        steps.set_timesteps(T)
        with soft_cache(model, NAMES) as cache:
            for row, t in zip(plan.float().to(run.device), steps.timesteps, strict=True):
                cache.weights = row
                routed = predicted_noise(x, t, y)
                cache.weights = None if real else torch.ones_like(row)
                full = predicted_noise(x, t, y)
                said.append(torch.stack([routed, full]))
                x = steps.step(routed if real else full, t, x).prev_sample
        return torch.stack(said, dim=1)  # (2, steps, n, 1, 8, 8)

    (single, clean), (routed, same_image) = walk(False), walk(True)
    pairs = ((single, clean), (routed, same_image), (routed, clean))
    return torch.stack([(a - b).square().flatten(1).mean(1) for a, b in pairs]).cpu()


FOLLOWED = ("L2C-style @ 0.50", "HarmoniCa @ 0.50", "uniform @ 2", "random #0 @ 0.50")
ways = run_arms(
    lambda name, seed: along_the_way(plan_of(name, seed), seed), {k: k for k in FOLLOWED}, s.seeds, s.jobs
)
ways = {name: torch.stack(of) for name, of in ways.items()}  # (seeds, 3, steps)
late = slice(T - T // 3, T)
for name, way in ways.items():
    single, old, real = way[..., late].sum(2).unbind(1)
    print(
        f"{name:20s} last third: single step {single.mean():.5f}   old cache {old.mean():.5f}   real {real.mean():.5f}"
        f"   real / single {(real / single).mean():.1f}"
    )
for claim, name in (("discrepancy", "uniform @ 2"), ("discrepancy-l2c", "L2C-style @ 0.50")):
    single, _, real = ways[name][..., late].sum(2).unbind(1)
    run.record(claim, real / single)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four panels, error of the predicted noise against the step on logarithmic axes, for the plans L2C-style, HarmoniCa, uniform and random. Single step is the lowest line in all but the uniform panel, where it consists of dots and coincides with old cache. Old cache and real rise along the way and cross in all panels but that one; real ends highest, or near it."}, "figure": {"caption": "Error of the predicted noise along the way. Grey: in the situation of L2C's training. Light blue: in the real trajectory, against the full network on the same image, so that only the cache is to blame. Dark blue: in the real trajectory, against the full sampler. Bands: 90 % intervals over seeds. A step in which all branches compute has no error of the cache. The grey and the light line have a gap wherever that is so on any seed; for the uniform plan only single dots are left.", "name": "fig-harmonica-discord"}}
fig, axes = plt.subplots(2, 2, figsize=(7, 4.6), sharex=True, sharey=True, layout="constrained")
for ax, (name, way) in zip(axes.flat, ways.items(), strict=True):
    for k, (label, colour) in enumerate(
        (("single step", PALETTE[6]), ("real: old cache", PALETTE[5]), ("real", PALETTE[0]))
    ):
        mean, low, high = mean_interval(torch.where(way[:, k] > 1e-9, way[:, k], torch.nan)[:, 1:])
        ax.plot(range(1, T), mean, "o-", ms=2.5, lw=1.3, color=colour, label=label)
        ax.fill_between(range(1, T), low.clamp(min=mean / 3), high, color=colour, alpha=0.2, lw=0)
    ax.set(
        title=name.replace(" #0", "").replace(" @ 0.50", "").replace("@", "$N =$")
        + ("$\\phantom{.}$" if "@ 2" in name else ""),
        yscale="log",
    )
for ax in axes[1]:
    ax.set(xlabel="step")
for ax in axes[:, 0]:
    ax.set(ylabel="mean squared error of $\\hat\\epsilon$")
fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncol=3, fontsize=9)
plt.show()

# %% [markdown]
# ### What one sees
#
# Nearness is not quality. So we let this book's oracle, a network that reads digits, say whether the digit is the one that was asked for, and compare the distribution of its features with that of real digits (the Fréchet distance; with so few images it is far from its value for many and differs much from seed to seed, so only the ratio of two arms is used). The last line of the output gives the distance between two sets of real digits, *floor*, and that of noise, *ceiling*.

# %%
oracle, real_digits, held_out = zoo.load("oracle_digits"), load("digits", "train"), load("digits", "test")
of_real = features(oracle, real_digits.x)
asked = [start(s.noises, torch.Generator().manual_seed(seed))[1].cpu() for seed in s.seeds]
right, distance = {}, {}
for name in (
    REFERENCE,
    "HarmoniCa @ 0.31",
    "HarmoniCa @ 0.50",
    "HarmoniCa @ 0.65",
    "random #0 @ 0.65",
    "L2C-style @ 0.50",
):
    right[name] = torch.tensor(
        [class_accuracy(oracle, v, c) for v, c in zip(images[name], asked, strict=True)]
    )
    distance[name] = torch.tensor([frechet_distance(features(oracle, v), of_real) for v in images[name]])
    print(f"{name:20s} digit right {right[name].mean():6.1%}   Fréchet distance {distance[name].mean():7.3f}")
print(
    "context, first seed, full sampler:",
    frechet_report(oracle, images[REFERENCE][0], real_digits.x, held_out.x),
)
run.record("accuracy", right["HarmoniCa @ 0.31"] - right[REFERENCE])
run.record("distance", distance["HarmoniCa @ 0.31"] / distance[REFERENCE])

# %% tags=["hide-input"] mystnb={"image": {"alt": "Rows of twelve handwritten digits of 8 by 8 pixels: the full sampler, and six cheaper ones. All rows show clear digits; single strokes differ."}, "figure": {"caption": "The same noise, seven samplers; at the left of each row its mean squared error to the full sampler, over all images of all seeds; for random at 0.50 that of the first random plan alone. The first twelve images of the first seed, not chosen.", "name": "fig-harmonica-digits"}}
rows = [
    REFERENCE,
    "HarmoniCa @ 0.31",
    "HarmoniCa @ 0.50",
    "uniform @ 2",
    RIVAL["uniform @ 2", seed],
    "random #0 @ 0.50",
    "random #0 @ 0.65",
]
labels = [
    f"{name.replace(' #0', '')}\n{to_full[name].mean():.4f}" if name in to_full else name for name in rows
]
fig, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
columns = min(12, s.noises)
show_images(torch.cat([images[name][0][:columns] for name in rows]), columns, ax=ax, row_labels=labels)
plt.show()

# %% [markdown]
# ### What is it worth in seconds?
#
# Operations are not time. We time the whole sampler, in turns without and with the learned plan, and compare the least times.

# %%
x, y = start(s.timed, torch.Generator().manual_seed(3))
ratios = []
for seed in s.seeds:
    plan = plan_of("HarmoniCa @ 0.50", seed)
    slow, fast = times(
        [lambda: draw(everything(T), x, y), lambda p=plan: draw(p, x, y)], repeats=3, min_seconds=0.01
    )
    ratios.append(slow / fast)
run.record("speed", ratios)
fewer = MACS.speed_up(plan_of("HarmoniCa @ 0.50", s.seeds[0]))
display(
    Markdown(
        f"At a CUR of 0.5: {sum(ratios) / len(ratios):.2f} times faster on this machine, with {fewer:.2f} times fewer operations."
    )
)

# %%
run.report()

# %% [markdown]
# **How to read the table.** The exact claims are about the machinery, and all of them held: a plan of ones is the plain sampler, a branch that rests executes nothing, training with weights of 0 and 1 is inference, and what it costs is what the formula says, here and in DiT-XL/2. A cache of this kind saves what it promises; *speed* says how much of that arrives as time on one core.
#
# Of the claims about quality, many did not hold. *Random-fewer-steps* and *when* are contradicted. *Fewer-steps* is weaker than claimed. *Learned-random-31*, *fewer-steps-31*, *uniform*, *uniform-n3*, *no-iepo*, *which*, *discrepancy* and *distance* are inconclusive. One reason is common to all that are inconclusive: there are three seeds. Each has noise and classes of its own, and trains a router of its own, in a short training that ends somewhere else on each seed, and an interval from three such numbers is wide. Nothing more was tried to decide them. The `gpu` profile has more seeds and a longer training, and was not run.
#
# **Does caching pay?** The uniform plan says yes: *uniform-fewer-steps* and, against the near-exact solution, which neither side imitates, *exact-uniform* are confirmed, with a plan that nobody trained. For the learned plan, *exact-fewer-steps* is confirmed. *Fewer-steps*, against the full sampler, is weaker: the whole interval is on the side of the learned plan, but the mean misses the threshold of half the error. The likely reasons are the two of the next paragraph, and the short training.
# *Fewer-steps-31*, at the paper's saving, is inconclusive. Its interval reaches far to both sides of no effect and its mean is close to it, so it gives no direction; the likely reason is the one of *learned-random-31* below.
#
# *Random-fewer-steps* is contradicted: fewer steps beat random plans. Two things help fewer steps here. Their number is rounded up, which at ten steps is up to a tenth more operations than the plan has. And the full sampler, which serves as the reference, is DDIM too: fewer steps share a part of its error. The right panel of {numref}`fig-harmonica-pareto` fits the second: against the near-exact solution the random
# plans have, on average, the smaller error. No claim tests that, and the bars are wide. Rounding is not all of it: on the left, random plans at half of the cost lie no lower than DDIM with ten steps. So not any cache pays; it depends on the plan.
#
# On the page on {doc}`DeepCache </notebooks/04-caching/deepcache>` fewer steps won nearly everywhere, on another model. A likely reason for the difference: there a caption settles nearly everything in the image, the way is nearly straight, and long steps cost little. Here twenty steps are few, a class leaves the digit open, and a step that reuses branches still sees its own image, its own time, and its own gates.
#
# **Is anything learned?** *Learned-random*, at one half, is confirmed. It is a stronger control than it looks: in a random plan a branch that computes in about half of the steps is at most two steps old in about six steps of seven, and hardly any step is left without fresh branches. (The threshold here was first guessed lower, at 0.3; pilots on another seed, before the card was closed, showed that to be too bold.)
#
# *Learned-random-31* asks the same of the same router, cut at another threshold, and is inconclusive; the mean is close to no effect and gives no direction. (The errors in the table of arms put the learned plan ahead. But those are means over seeds, led by the seed with the largest errors. The claim takes the ratio on each seed first.) Two likely reasons. The price was set for one half. A cut at 0.31 has to order entries that most likely all lie under the training's own threshold; there a short training with large steps tells more of how early an entry was pushed down than of what it is worth. And there is only one random plan a seed to compare with.
#
# *Uniform* and *uniform-n3* compare with counting to two and to three, and both are inconclusive. Both means point against the learned plan; for *uniform-n3* nearly the whole interval does. So this page does not show that learning beats FORA, the claim that it set out from. The most likely reason is taken up below: the loss gives no credit for renewing what is kept, and even distances have that for free;
# our training is also very short. Against the near-exact solution the table of arms has the learned plan ahead of the uniform one on average, at both savings. No claim tests that.
#
# *When* and *which* take the learned plan apart. Shuffle each branch's column, and each branch still computes as often, at other times. Shuffle each row, and each step still computes as much, but other branches. *When* is contradicted, clearly: moved to random times, the plan is slightly *nearer* to the full sampler. The router did not learn useful times. Look at the barcode: it computes nearly all in a block of
# consecutive steps, where the cache would have been fresh anyway, and hardly anything in other stretches, where it grows old. The shuffle breaks up both. *Which* is inconclusive. Its mean is far on the side of the claim, above the threshold, but the seeds differ so much that the interval includes no effect. So what the router has learned seems to be which branches compute, and not when; the second half of that is measured, the first is not settled.
#
# *Whole-steps* spends the same on the steps in which the router computes most, and lets all branches rest in the others. It is confirmed, but be careful with what it says. The uniform plan computes whole steps too, and is far nearer than this arm. So the pattern within a step is not needed for a good plan; much of the loss must come from whole steps that lie in clusters, with long gaps between.
#
# **The two ideas.** *No-sdt* and *no-iepo* change one thing each. *No-sdt* is confirmed. Look at {numref}`fig-harmonica-barcode` and {numref}`fig-harmonica-discord` together. In single steps what is kept is always one step old and always fresh from the full network. So a branch whose output moves slowly seems free at each of many steps, and the router lets it rest at all of them. In the real trajectory it then does
# not compute between the start and the last steps: what is kept grows as old as the trajectory, which the training has never seen. The grey line and the blue ones of the L2C-style plan part from step 2 on. L2C's own sampler rules this out, as it computes everything in every second step. So the comparison speaks of HarmoniCa's setting, in which a cache may grow old, and not of L2C as its authors use it.
#
# *Discrepancy-l2c* puts a number on the difference, and is confirmed. Its size means little: in the last steps this plan computes nearly everything, so the error of the single steps, by which we divide, is nearly nothing. *Discrepancy* asks the same of the uniform plan, where the cache is equally old in both situations, and only the image has gone astray. It is inconclusive. The mean is above the threshold, in the
# paper's direction, but the ratio differs so much between the seeds that the interval includes no effect. The likely reason is that few images are followed, and that few of them can make up most of a mean squared error.
#
# IEPO weighs the steps. *No-iepo* is inconclusive: the mean is in favour of IEPO, by about as much as was claimed, but the interval includes no effect and more, so it may as well hurt. In the last steps the network's answer changes most from step to step, so with equal weights the branches that compute crowd there, though errors made early are carried along. But the left panel of {numref}`fig-harmonica-lambda` shows a
# difficulty too, and the likely reason for the spread. $\lambda_t$ depends on the router that is being trained. Where nearly all branches compute, the cache does nothing to the image, the weight is nearly 0, and so the router is free to let them rest; the next table then finds a large error there, and raises the weight. The tables chase the router, and where a short training stops is a matter of chance. The paper
# refreshes them 40 times in a training, we do it three times.
#
# **One thing the loss cannot see.** In equation {eq}`eq-harmonica-loss` the gradient of a step reaches the weights of that step only. But to compute a branch has a second use: it renews what is kept, and later steps profit. No term of the loss gives credit for it. SDT brings it in through the back door: a step that meets an old cache has a large error, and computes. Whoever computes at even distances has it for free.
# This explanation fits *uniform*, *uniform-n3* and *when*; no arm of this page isolates it, and a training that was longer might do better with the same loss.
#
# **Can one see it?** *Accuracy*, at the paper's saving, is confirmed: as many digits are right, within the margin. *Distance* is inconclusive: the mean is within the margin, slightly on the worse side, but the upper end of the interval is beyond it. Both are mild tests. The oracle is near its ceiling, and with so few images the distance is mostly due to their number. Random plans at a CUR of 0.65, far from the full
# sampler in pixels, do no worse in either; of the arms shown, only the L2C-style plan falls clearly behind in both. So *accuracy* is no proof that the cache is lossless.
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# - **A router trained to its end.** The paper trains each row 2,000 times on 64 images; here it is 66 times on two, with steps of the logits that are twenty times as large. The goal is set by a price that follows it, not by a price that is tuned. A longer training may find better plans; see exercise 2.
# - **The paper's thresholds.** All routers are cut where just the wanted share of their entries rests, not at 0.1. A weight near the cut was soft in training: its branch mixed old and new, which no hard plan does.
# - **L2C itself.** Its rule, that every second step computes everything, is in no learned arm.
# - **Guidance and text.** The paper trains and samples with guidance. Both halves would share the plan.
# - **A network at scale.** Sixteen branches, not 56. With more blocks there is more to choose from, and the premise, that many branches hardly change, may hold better.
# - **Perceived quality.** The mean squared error to a reference punishes any change, also a harmless one. The paper's tables are of FID and of scores of images and text.
# - **Another training of the network.** There is one. The intervals cover the training of the routers, the noise and the classes.
# - **Left untried:** PixArt-$\alpha$ and $\Sigma$, DiT-XL/2's FID, the claim that training takes 25 % less time than L2C, and the mix with quantisation.
# :::
#
# ## Exercises
#
# **1.** FORA counts to $N$. Given ten steps in which all branches compute, and no more, are even distances best? Try plans that are dense early, and dense late. Predict with {numref}`fig-harmonica-lambda`.

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
# Key steps at i^p, stretched over the sampler: p = 1 is even, p > 1 is dense early, p < 1 dense late.
seed, keys = s.seeds[0], T // 2
x, y = start(s.noises, torch.Generator().manual_seed(seed))
x, y = x[:16], y[:16]
reference = images[REFERENCE][0][: len(x)]
for p in (0.75, 1.0, 1.25, 1.5):
    marks = sorted({round(T * (i / keys) ** p) for i in range(keys)})
    image = draw(key_step_plan(T, B, marks), x, y).clamp(-1, 1).cpu()
    print(
        f"p = {p}: {len(marks)} key steps {marks}, mean squared error {(image - reference).square().mean():.5f}"
    )
# Judged on few images. Two marks may fall into one step; such a plan computes less.

# %% [markdown]
# **2.** Equation {eq}`eq-harmonica-mix` is soft, the sampler is hard. How many weights of the trained router are undecided, say between 0.1 and 0.9? What does a weight of 0.3 mean for the *age* of what is kept, if the mixture is kept?
#
# :::{dropdown} Solution 2: in words
# What is kept is replaced by $r\, o^{\text{new}} + (1 - r)\, o^{\text{kept}}$. After $k$ steps with the same $r$ the first output has a share of $(1 - r)^k$: the cache is a moving average, with a mean age of $(1 - r)/r$ steps, about 2.3 at $r = 0.3$. A hard plan at threshold 0.1 computes that branch in every step, age 0; a plan that is cut above 0.3 never renews it, and its age grows to the end.
# So a router with many weights in the middle has been trained on a cache that no hard plan has. The next cell counts them. Longer training, and a higher price, drive the weights apart. The limit of $\pm 5$ on the logits keeps them able to come back.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2: counted", "code_prompt_hide": "Solution 2: counted"}
for name, trained in routers.items():
    weights = torch.stack([router["weights"][1:] for router in trained])
    undecided = ((weights > 0.1) & (weights < 0.9)).double().mean()
    print(
        f"{name:10s} between 0.1 and 0.9: {undecided:.0%}; above 0.9: {(weights >= 0.9).double().mean():.0%}"
    )

# %% [markdown]
# **3.** Row $t$ of the router is updated once in each trajectory. Why is one update of all rows at the end of a trajectory the same as an update after each step? When would it not be?
#
# :::{dropdown} Solution 3: in words
# Row $t$ is used at step $t$ only. Its update after step $t$ changes nothing in the steps that follow in the same trajectory: these use other rows. The state $x$ and the cache were made with the rows as they were. AdamW keeps its moments for each number by itself, and each gets one gradient a trajectory either way. It would not be the same if rows shared parameters, if the
# gradients of all rows were clipped together, or if the loss of a step reached earlier rows through the cache.
# :::
#
# ## References
#
# The method: {cite:t}`harmonica`, with its code [ModelTC/HarmoniCa](https://github.com/ModelTC/HarmoniCa) (`train_router.py`, `models/router_models.py`, `models/dynamic_models.py` and `diffusion/gaussian_diffusion.py` were read; the comparison tables of the paper were not). What it builds on: {cite:t}`ma2024learning`, with [horseee/learning-to-cache](https://github.com/horseee/learning-to-cache) (`DiT/models/dynamic_models.py` and `DiT/train_router.py` were read). The uniform plan: {cite:t}`selvaraju2024fora`. The
# backbone: {cite:t}`peebles2023scalable`. The samplers: {cite:t}`song2021denoising`, {cite:t}`lu2022dpm`. The library's parts:
# [minilib/cache_plans.py](https://github.com/minilib-book/minilib/blob/main/minilib/cache_plans.py), [minilib/cache_router.py](https://github.com/minilib-book/minilib/blob/main/minilib/cache_router.py), [minilib/intervene/cache.py](https://github.com/minilib-book/minilib/blob/main/minilib/intervene/cache.py).
