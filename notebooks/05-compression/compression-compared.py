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
# # Smaller: by depth, by width, by bits?
#
# Four papers make a diffusion transformer smaller. One drops blocks, one drops heads and neurons, two drop bits. Each page of this part sets its method against rivals of its own kind. This page sets the kinds against each other: one model, one sampler, the same noise, and the same number of short training steps for all that are trained.

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
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown, display

from minilib import zoo
from minilib.adapters import add_lora
from minilib.arms import run_arms
from minilib.caching import equal_cost_steps
from minilib.costs import attention_flops, dit_flops, dit_parameters, linear_flops
from minilib.data import load
from minilib.distillation import DistillationLoss
from minilib.metrics import class_accuracy, frechet_report, psnr_to_reference
from minilib.models import DIT_CONFIGS, DiT
from minilib.plotting import PALETTE, mean_interval, show_images, use_style
from minilib.profiling import count_flops, count_parameters, to_meta
from minilib.pruning import (
    HardConcreteMasks,
    NMGates,
    block_influence,
    contribution,
    drop_blocks,
    find_sites,
    gated_blocks,
    gumbel_noise,
    gumbel_temperature,
    keep_highest,
    keep_top,
    masked,
    ones,
    shrink_model,
    shrunk_parameters,
)
from minilib.quantization import (
    OFF,
    QuantSpec,
    calibrate,
    channel_balance,
    fold_balance,
    modulated_inputs,
    quant_layers,
    quantize_copy,
    select_layers,
    uniform_rules,
    watch_channels,
    weight_memory,
)
from minilib.quantization.model import applied_rules, run_call
from minilib.recipes.digits import ddpm_scheduler, sample_digits, sampling_scheduler
from minilib.recipes.digits_p2 import digits_batches, digits_loss
from minilib.reproduction import Reproduction
from minilib.sampling import initial_noise
from minilib.schedulers import DPMSolverMultistepScheduler
from minilib.step_checkpoint import checkpointed_steps, run_steps
from minilib.training import step_generator, update_ema


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]  # each: searches, calibration, training data and noise of its own
    steps: int  # of the sampler, T
    exact_steps: int  # of the near-exact solution
    images: int  # judged, a seed
    gate_steps: int  # of learning which blocks stay
    gate_batch: int
    updates: int  # of learning which heads and neurons stay
    noises: int  # samplers run at once, an update
    calibration: int  # images whose way through the sampler sets ranges and factors
    tune_steps: int  # of training: the same for everything that is trained
    tune_batch: int
    jobs: int  # processes


run = Reproduction(
    "compression-compared",
    profile,
    {
        "smoke": Settings((0,), 4, 6, 20, 2, 4, 1, 2, 4, 1, 8, 1),
        "cpu": Settings((0, 1, 2), 10, 40, 256, 100, 48, 40, 16, 64, 120, 48, 2),
        "gpu": Settings((0, 1, 2, 3, 4), 10, 200, 368, 2000, 128, 200, 64, 256, 4000, 128, 1),
    },
)
s = run.settings
use_style()
run.show_card()

# %% [markdown]
# ## Settings
#
# The model is the digit transformer that {doc}`/notebooks/05-compression/tinyfusion` and {doc}`/notebooks/05-compression/ecodiff` cut: eight blocks, 16 tokens of $2 \times 2$ pixels. {doc}`/notebooks/05-compression/quest` and {doc}`/notebooks/05-compression/vidit-q` round other networks; here they meet this one. An *arm* is one way to make the model cheaper. All arms draw with the same sampler, DPM-Solver++ {cite:p}`lu2022dpm`, without guidance; *steps* in the table is its number of steps. What is said below about results is about the profile *cpu*, which was run.

# %%
run.show_settings()

# %% [markdown]
# (sec-compression-compared-idea)=
# ## The idea
#
# A network costs two things that have to be kept apart.
#
# - **Bytes of weights.** They decide whether it fits, and how long it takes to load. The bits of activations do not count here, nor do solver steps.
# - **Work.** We count multiply-accumulates (MACs), and because a product of numbers with few bits is cheaper than one of numbers with many, *bit operations* (BOPs). A layer with $n$ MACs, weights of $b_w$ bits and activations of $b_a$ bits costs
#
# $$
# \mathrm{BOPs} = n\, b_w\, b_a .
# $$ (eq-compression-compared-bops)
#
# What is not rounded is held in half precision, 16 bits; the weights of this book's trained models are stored so anyway. **W4A8** means: weights of four bits, activations of eight. Attention's own products, queries with keys and weights with values, stay at $16 \times 16$ in all arms. BOPs are what an ideal processor would gain. All rounding here is simulated, and a real processor has products for some pairs of bits only.
#
# Depth and width save bytes and MACs together. Bits save bytes in proportion, and BOPs by both factors. Fewer solver steps save work alone: that is the rival that needs no idea.
#
# Quality has two sides too.
#
# - **Nearness**: the peak signal-to-noise ratio (PSNR), in decibels, of each image to the full model's image from the same noise. Twenty decibels more are a tenth of the root-mean-square error.
# - **Looks**: the Fréchet distance of a small classifier's features to those of training images. Its *floor* is the distance of held-out real digits.
#
# They need not agree. A model that was trained after the cut may draw another digit, as good as the first: low nearness, good looks. A model that was only rounded was never asked to do more than stay where it was. So {numref}`fig-compression-compared-main` shows both, against both costs.

# %%
# NBVAL_CHECK_OUTPUT
model = zoo.load("dit_digits_p2").requires_grad_(False).eval().to(run.device)
depth, sites = len(model.blocks), find_sites(model)
EDGES = ("x_embedder.proj", "final_layer.linear")  # first and last layer: at least 8 bits
in_units = sum(site.units * site.parameters for site in sites.values()) / count_parameters(model)
modulation = sum(p.numel() for name, p in model.named_parameters() if "adaLN" in name) / count_parameters(
    model
)
print(
    f"{count_parameters(model):,} parameters: {in_units:.1%} in heads and neurons, {modulation:.1%} in modulations"
)

# %% [markdown]
# *Neurons* are the hidden units of the feed-forward networks. *Modulations* are the layers that turn time and class into shifts, scales and gates. Heads and neurons hold two thirds of the weights of a block. The modulations hold the rest. So to lose a quarter of the bytes one drops two blocks of eight, or $\frac{3}{8}$ of all heads and neurons. That is the pair of arms with **equal bytes** on which depth meets width. The second does less work, because in each call modulations run once an image and the rest once a token. So the match is equal in bytes, not in work.
#
# (sec-compression-compared-method)=
# ## The method
#
# ### Three ways to cut
#
# Depth, width and bits. Each is the method of its page, shortened; the explanations are there. A *trivial* or cheap choice stands beside each: the first blocks, or those that ShortGPT's score picks in one forward pass; dropping the heads and neurons that contribute least by activation times weight; plain rounding.
#
# Two things to keep in mind. TinyFusion's search has to keep as many blocks of the first half as of the second; the first blocks, and ShortGPT's, need not. And EcoDiff's masks are learned through eight steps of DDIM, but judged with another sampler.


# %%
def learn_gates(keep, seed):
    """TinyFusion: which blocks stay, `keep` of 4 in each half; learned with a low-rank update that is thrown away."""
    net, make_batch, loss_of = deepcopy(model), digits_batches(), digits_loss()
    gates = NMGates(((keep, 4), (keep, 4))).to(run.device)
    average = deepcopy(gates)
    lora = add_lora(net, "blocks.*.**", rank=8, alpha=16, generator=torch.Generator().manual_seed(seed))
    parameters = [*gates.parameters(), *lora.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    for step in range(s.gate_steps):
        generator = step_generator(seed, step)
        batch = {k: v.to(run.device) for k, v in make_batch(generator, s.gate_batch).items()}
        noise = gumbel_noise((s.gate_batch, gates.num_patterns), generator).to(run.device)
        with gated_blocks(net, gates.sample(noise, gumbel_temperature(step, s.gate_steps))):
            loss_of(net, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        update_ema(average, gates, 0.97, step)
    return average.kept()


def learn_masks(_, seed):
    """EcoDiff: a score for each head and neuron, learned through all steps of an eight-step DDIM sampler."""
    grid = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-3.0, solver_order=1
    )
    grid.set_timesteps(8)
    signal = [*grid.alphas_cumprod_f64[grid.timesteps].tolist(), 1.0]
    g, masks = torch.Generator().manual_seed(seed), HardConcreteMasks(sites, init=3.0).to(run.device)
    optimiser = torch.optim.Adam(masks.parameters(), lr=0.15)
    for _ in range(s.updates):
        y = torch.randint(10, (s.noises,), generator=g).to(run.device)
        noise = initial_noise((s.noises, 1, 8, 8), g, device=run.device)

        def step(i, x, y=y):
            a, b = signal[i], signal[i + 1]
            e = model(x, torch.full((len(x),), float(grid.timesteps[i]), device=x.device), y)[:, :1]
            return (b / a) ** 0.5 * (x - (1 - a) ** 0.5 * e) + (1 - b) ** 0.5 * e

        with torch.no_grad():
            target = run_steps(step, noise, 8)
        masks.draw(g)
        m = masks()
        with masked(model, m):  # backward() runs the steps again, so it belongs inside
            last = checkpointed_steps(step, noise, 8, list(m.values()))
            optimiser.zero_grad()
            (F.mse_loss(last, target) + masks.penalty()).backward()
        optimiser.step()
    return {name: score.cpu() for name, score in masks.scores().items()}


found = run_arms(
    lambda job, seed: job[0](job[1], seed),
    {"gates 6": (learn_gates, 3), "gates 4": (learn_gates, 2), "masks": (learn_masks, None)},
    s.seeds,
    s.jobs,
)
for name in ("gates 6", "gates 4"):
    print(f"TinyFusion keeps {name[-1]}:", *found[name])


def cut_depth(how, keep, seed):
    """The model with `keep` of its blocks."""
    if how == "TinyFusion":
        return drop_blocks(model, found[f"gates {keep}"][s.seeds.index(seed)])
    if how == "ShortGPT":  # what turns its tokens least goes
        batch = digits_batches("validation")(step_generator(seed, 0), 64)
        x_t = ddpm_scheduler().add_noise(batch["x0"], batch["noise"], batch["t"])
        inputs = [v.to(run.device) for v in (x_t, batch["t"], batch["y"])]
        return drop_blocks(
            model, keep_highest(block_influence(model, lambda net: net(*inputs)), keep, spare_last=True)
        )
    return drop_blocks(model, tuple(range(keep)))  # "first"


def cut_width(how, removed, seed):
    """The model without a share of its heads and of its neurons."""
    scores = found["masks"][s.seeds.index(seed)]
    if how == "Wanda":
        g = torch.Generator().manual_seed(seed)
        y = torch.randint(10, (s.calibration,), generator=g).to(run.device)
        scores = contribution(model, lambda: sample_digits(model, y, 1.0, steps=s.steps, seed=5000 + seed))
    return shrink_model(model, keep_top(scores, 1 - removed, sites))


# %% [markdown]
# Rounding comes in three kinds. All have a grid for each output of a weight, found by search.
#
# - **plain**: one range a layer for activations, found by search on calibration images;
# - **table**: one range for each step of the sampler (QuEST's start);
# - **token**: a range for each token, found when it comes, after channel balancing with $\alpha = 0.5$ (ViDiT-Q). We balance only where it costs nothing, that is where the factors can be folded into a modulation.
#
# Unlike the page of ViDiT-Q, which leaves the modulations alone, all linear layers are rounded here, or a third of the bytes would stay. The first and the last layer keep at least 8 bits.

# %%
grid = sampling_scheduler()
grid.set_timesteps(s.steps)
TIMES = [float(t) for t in grid.timesteps]


def rules_of(kind, w, a):
    """How each layer is rounded; w and a are the bits of weights and activations."""
    activation = QuantSpec(a, "token", dynamic=True) if kind == "token" else QuantSpec(a, scale_init="mse")
    return uniform_rules(QuantSpec(w, "channel", scale_init="mse"), activation, keep=EDGES)


@torch.no_grad()
def rounded(net, kind, w, a, seed):
    """A copy of a network, rounded and calibrated."""
    calls, y = [], load("digits", "validation").y[: s.calibration].to(run.device)
    handle = net.register_forward_pre_hook(lambda _, args: calls.append(args))
    sample_digits(net, y, 1.0, steps=s.steps, seed=5000 + seed)
    handle.remove()
    if kind == "token":
        with watch_channels(net, list(modulated_inputs(net))) as maxima:
            for call in calls:
                run_call(net, call)
        scales = {name: made.scale[0] for name, made in channel_balance(net, maxima, alpha=0.5).items()}
        net = fold_balance(deepcopy(net), scales)
    net = quantize_copy(net, rules_of(kind, w, a), timesteps=TIMES if kind == "table" else None)
    calibrate(net, calls)
    return net


# %% [markdown]
# ### One training for all
#
# What is trained gets the same data, as many steps and the same loss: TinyFusion's distillation loss without its feature term, which wants equal shares of blocks. The teacher is the full model, and the learning rate falls to zero. Cut networks train all weights, and are put back to half precision. QuEST trains its list and its scales: the layers that read the time, queries, keys and values, and the feed-forward network. In a DiT that is nearly everything. And one arm trains all weights under ViDiT-Q's rounding at W4A8. That arm is ours: ViDiT-Q itself trains nothing. What the searches cost before is not counted.

# %%
LISTED = ("t_embedder.*", "**.adaLN_modulation", "**.attn.qkv", "**.mlp.*")  # QuEST's list, in a DiT's names


class Arm(NamedTuple):
    family: str
    cut: tuple | None = None  # (function, how, how much)
    bits: tuple | None = None  # (kind, weight bits, activation bits)
    trained: bool = False
    steps: int = s.steps

    def shape(self, seed):
        return model if self.cut is None else self.cut[0](*self.cut[1:], seed)


def train(arm, seed):
    """The network of an arm after training: cut networks before they are rounded, others after."""
    net = deepcopy(arm.shape(seed)) if arm.cut else rounded(model, *arm.bits, seed)
    weights, scales = list(net.parameters()), []
    if not arm.cut and arm.bits[0] == "table":
        weights = [p for layer in quant_layers(net, LISTED).values() for p in (layer.weight, layer.bias)]
        scales = [layer.activation_quantizer.log_scale for layer in quant_layers(net).values()]
    elif not arm.cut:
        weights = [p for name, p in net.named_parameters() if "log_scale" not in name]
    for p in [*weights, *scales]:
        p.requires_grad_(True)
    groups = [{"params": weights, "lr": 1e-3}, {"params": scales, "lr": 3e-2}]
    optimiser = torch.optim.Adam(groups if scales else groups[:1])
    falling = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: 1 - i / s.tune_steps)
    loss, make_batch = DistillationLoss(ddpm_scheduler(), model), digits_batches()
    for step in range(s.tune_steps):
        batch = make_batch(step_generator(seed, step), s.tune_batch)
        loss(net, {k: v.to(run.device) for k, v in batch.items()}).backward()
        optimiser.step()
        optimiser.zero_grad()
        falling.step()
    net.requires_grad_(False)
    if arm.cut:
        for p in weights:
            p.data = p.data.half().float()
        return net
    for layer in quant_layers(net).values():
        layer.forget_weights()
    return net


# %% [markdown]
# ### What it costs
#
# Bytes and bit operations are counted: from the parameters, and from what passes through each layer.


# %%
def work_of(net):
    """MACs of one call for one image: of each linear layer, and of all."""
    ghost, macs, c = to_meta(net), {}, net.config
    for name, layer in select_layers(ghost).items():
        layer.register_forward_pre_hook(
            lambda m, x, name=name: macs.update({name: x[0].shape[:-1].numel() * m.weight.numel()})
        )
    x = torch.zeros(1, c["in_channels"], c["input_size"], c["input_size"])
    return macs, count_flops(ghost, x, torch.zeros(1), torch.zeros(1).long()).macs


def cost(net, work, bits=None):
    """Bytes of the weights, and bit operations of one call for one image."""
    (macs, total), rules = work, rules_of(*bits) if bits else []
    bops = 256 * total
    for name, rule in (applied_rules(net, rules) if rules else {}).items():
        bops += macs[name] * (rule.weight.bits * rule.activation.bits - 256)
    rows = len(TIMES) if bits and bits[0] == "table" else 1
    memory = weight_memory(net, rules, float_bytes=2, times=rows)
    return memory.weights + memory.scales, bops


def by_hand(config, keep, w=16, a=16):
    """The same for `keep` blocks at one pair of bits, from closed forms."""
    c = {**config, "depth": keep}
    d, n = c["hidden_size"], (c["input_size"] // c["patch_size"]) ** 2
    mixing = keep * attention_flops(1, 1, n, n, d) // 2
    patch = c["patch_size"] ** 2 * c["in_channels"]
    ends = [
        (patch, d),
        (d, patch * (1 + c["learn_sigma"])),
    ]  # (inputs, outputs) of the first and the last layer
    inner = [(256, d), (d, d), (d, 2 * d)] + keep * [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d), (d, 6 * d)]
    end_work = sum(linear_flops(n, i, o) // 2 for i, o in ends)
    bops = 256 * mixing + max(w, 8) * max(a, 8) * end_work
    bops += w * a * (dit_flops(c) // 2 - mixing - end_work)
    if w == 16:
        return 2 * dit_parameters(c), bops
    held = 2 * dit_parameters(c)
    for layers, b in ((ends, max(w, 8)), (inner, w)):
        held += sum(i * o * b // 8 - 2 * i * o + 4 * o + o * b // 8 for i, o in layers)
    return held, bops


with torch.device("meta"):
    xl = DiT(**DIT_CONFIGS["DiT-XL/2"])
off, table = [0, 0], []
for size, net in {"here": model, "DiT-XL/2": xl}.items():
    blocks, places = len(net.blocks), find_sites(net)
    ways = {
        f"{k} of {blocks} blocks": (drop_blocks(net, tuple(range(k))), None)
        for k in (blocks, 3 * blocks // 4, blocks // 2)
    }
    ramp = {name: torch.arange(site.units).float() for name, site in places.items()}
    for q in (0.2, 0.375):
        keep = keep_top(ramp, 1 - q, places)
        ways[f"{q:.1%} of heads, neurons gone"] = small, _ = shrink_model(net, keep), None
        off[0] += abs(weight_memory(small, float_bytes=2).weights - 2 * shrunk_parameters(net, keep))
    work = {name: work_of(small) for name, (small, _) in ways.items()}
    whole = list(work)[0]
    for w, a in ((8, 8), (4, 8), (4, 4)):
        ways[f"W{w}A{a}"], work[f"W{w}A{a}"] = (net, ("token", w, a)), work[whole]
    costs = {name: cost(small, work[name], bits) for name, (small, bits) in ways.items()}
    for name, (held, bops) in costs.items():
        table.append(
            f"| {size} | {name} | {held:,} | {held / costs[whole][0]:.1%} | {bops / costs[whole][1]:.1%} |"
        )
        if "gone" not in name:
            small, bits = ways[name]
            formula = by_hand(net.config, len(small.blocks), *(bits or (None, 16, 16))[1:])
            off = [o + abs(x - y) for o, x, y in zip(off, (held, bops), formula, strict=True)]
run.record("real-size", costs["W8A8"][0] / costs["14 of 28 blocks"][0])
run.record("bytes", off[0])
run.record("bops", off[1])
display(
    Markdown(
        "\n".join(
            ["| size | what | bytes of weights | share | bit operations |", "|---|---|---|---|---|", *table]
        )
    )
)

# %% [markdown]
# At DiT-XL/2's size eight bits and half of the blocks are nearly the same bytes (*real-size*). At ours eight bits need slightly more: in a small model scales and the parts that are not rounded weigh more.
#
# One more check before anything is compared: at its neutral setting each of the three kinds is the full sampler, bit for bit. All blocks stay, masks are one, and 32 bits round nothing.

# %%
y = torch.arange(10, device=run.device)
plain = sample_digits(model, y, 1.0, steps=s.steps, seed=7)
untouched = quantize_copy(model, uniform_rules(OFF, OFF), timesteps=TIMES)
neutral = [drop_blocks(model, tuple(range(depth))), shrink_model(model, ones(sites)), untouched]
with torch.no_grad():
    apart = [
        float((sample_digits(net, y, 1.0, steps=s.steps, seed=7) - plain).abs().max()) for net in neutral
    ]
    with masked(model, ones(sites, device=run.device)):
        apart.append(float((sample_digits(model, y, 1.0, steps=s.steps, seed=7) - plain).abs().max()))
run.record("neutral", max(apart))
print("largest difference of a pixel at the neutral settings:", *apart)

# %% [markdown]
# (sec-compression-compared-experiment)=
# ## The experiment
#
# :::{table} The arms. Those marked with a star are there untrained and trained.
# :name: tab-compression-compared-arms
#
# | kind | method | trivial rival of its kind |
# |---|---|---|
# | depth | TinyFusion's choice of 6 or 4 blocks of 8 \\* | the first 6 or 4, trained; ShortGPT's {cite:p}`men2025shortgpt` 6, trained |
# | width | EcoDiff's masks, 10 to 37.5 % of heads and neurons gone (\\* at 37.5 %) | what contributes least gone (activation times weight, after Wanda {cite:p}`sun2024simple`; \\* at 37.5 %) |
# | bits, no training | ViDiT-Q: W8A8, W6A8, W6A6, W4A8, W4A4 | plain rounding at the same bits |
# | bits, trained | QuEST at W4A4, ViDiT-Q's rounding at W4A8 | the same untrained |
# | steps | | the full model with fewer solver steps |
# | two at once | ViDiT-Q W8A8 with half of the steps; 6 blocks, trained, then W8A8 | either alone |
#
# :::
#
# "ViDiT-Q" and "QuEST" are short for what is described above, which leaves out parts of both. Seeds vary the searches, the calibration, the order of the training data, and the noise of the samples; all arms of a seed share them.

# %%
TF6, TF4, EC = (cut_depth, "TinyFusion", 6), (cut_depth, "TinyFusion", 4), (cut_width, "EcoDiff", 0.375)
PAIRS, SWEEP = ((8, 8), (6, 8), (6, 6), (4, 8), (4, 4)), [n for n in (2, 3, 4, 5, 6, 7, 8, 9) if n < s.steps]
ARMS = {"full model": Arm("steps")} | {f"full, {n} steps": Arm("steps", steps=n) for n in SWEEP}
ARMS |= {"TinyFusion 6": Arm("depth", TF6), "TinyFusion 4": Arm("depth", TF4)}
ARMS |= {
    f"{how} {k}, trained": Arm("depth", (cut_depth, how, k), None, True)
    for how, k in (("TinyFusion", 6), ("ShortGPT", 6), ("first", 6), ("TinyFusion", 4), ("first", 4))
}
ARMS |= {
    f"{how} {q:.3g} %": Arm("width", (cut_width, how, q / 100))
    for how in ("EcoDiff", "Wanda")
    for q in (10, 20, 30, 37.5)
}
ARMS |= {
    f"{how} 37.5 %, trained": Arm("width", (cut_width, how, 0.375), None, True)
    for how in ("EcoDiff", "Wanda")
}
ARMS |= {f"plain W{w}A{a}": Arm("plain bits", None, ("plain", w, a)) for w, a in PAIRS}
ARMS |= {f"ViDiT-Q W{w}A{a}": Arm("bits", None, ("token", w, a)) for w, a in PAIRS}
ARMS |= {
    "table W4A4": Arm("bits", None, ("table", 4, 4)),
    "QuEST W4A4, trained": Arm("bits", None, ("table", 4, 4), True),
}
ARMS |= {"ViDiT-Q W4A8, trained": Arm("bits", None, ("token", 4, 8), True)}
HALF = -(-s.steps // 2)
ARMS |= {f"W8A8, {HALF} steps": Arm("two", None, ("token", 8, 8), steps=HALF)}
ARMS |= {"6 blocks trained, W8A8": Arm("two", TF6, ("token", 8, 8), True)}

to_train = {name: arm for name, arm in ARMS.items() if arm.trained and not (arm.cut and arm.bits)}
nets = run_arms(train, to_train, s.seeds, s.jobs)
nets["6 blocks trained, W8A8"] = nets["TinyFusion 6, trained"]
labels = load("digits", "test").y[: s.images].to(run.device)
goals = {
    n: run_arms(
        lambda n, seed: sample_digits(model, labels, 1.0, steps=n, seed=seed).cpu(), {"": n}, s.seeds, s.jobs
    )[""]
    for n in (s.steps, s.exact_steps)
}


@torch.no_grad()
def judge(arm_and_nets, seed):
    """Nearness to the full model's images and to near-exact ones, Fréchet distance and floor, share read right; ten images."""
    arm, ready = arm_and_nets
    i = s.seeds.index(seed)
    net = ready[i] if ready else arm.shape(seed)
    if arm.bits and (arm.cut or not ready):
        net = rounded(net, *arm.bits, seed)
    x = sample_digits(net, labels, 1.0, steps=arm.steps, seed=seed).cpu()
    oracle, test = zoo.load("oracle_digits"), load("digits", "test")
    report = frechet_report(oracle, x, load("digits", "train").x, test.x)
    near = [float(psnr_to_reference(x, goal[i]).mean()) for goal in goals.values()]
    first = [int((test.y[: s.images] == digit).nonzero()[0]) for digit in range(10)]
    return *near, report.value, report.floor, class_accuracy(oracle, x, test.y[: s.images]), x[first]


judged = run_arms(judge, {name: (arm, nets.get(name)) for name, arm in ARMS.items()}, s.seeds, s.jobs)
COLUMNS = ("psnr", "exact", "FD", "floor", "right")
measured = {
    c: {name: torch.tensor([r[k] for r in rows], dtype=torch.float64) for name, rows in judged.items()}
    for k, c in enumerate(COLUMNS)
}
cuts = {arm.cut and (arm.cut[0], arm.cut[2]): arm.shape(s.seeds[0]) for arm in ARMS.values()}  # whoever chose
work = {cut: work_of(net) for cut, net in cuts.items()}
full = cost(model, work[None])
share = {}  # of the full model's bytes, and of its bit operations
for name, arm in ARMS.items():
    cut = arm.cut and (arm.cut[0], arm.cut[2])
    held, bops = cost(cuts[cut], work[cut], arm.bits)
    share[name] = held / full[0], arm.steps * bops / (s.steps * full[1])
floor = float(measured["floor"]["full model"].mean())

# %% [markdown]
# ## Results
#
# ### All on one plot

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four panels with the same points. Left column: bytes of weights, right column: bit operations of a sampling, both as a share of the full model's. Top row: PSNR to the full model, bottom row: Fréchet distance. Colours tell depth, width, plain rounding, ViDiT-Q's and QuEST's rounding, and two methods at once; filled points are trained, small ones are trivial choices. On the left the points of fewer steps stand at 100 percent; on the right they form a line that towards the left falls in the top row and rises in the bottom row. In the top left panel ViDiT-Q's rounding with eight or six bits for weights and eight for activations stands highest among all that save bytes; the cut models, trained or not, lie lower and further right."}, "figure": {"caption": "**All methods, against both costs.** Top: nearness to the full model. Bottom: looks; dotted, the floor. Left: bytes of the weights; fewer steps save none. Right: bit operations of the whole sampling. Open: untrained; filled: trained for equally many steps. Small: the trivial choice of its kind; the orange hexagon is ShortGPT's. Lines join arms that differ only in how much is saved; dashed, Wanda's rule. Of the two lines of each rounding, one keeps activations at eight bits (W8A8, W6A8, W4A8), the other lowers them too (W8A8, W6A6, W4A4). Green triangles that point to the right: QuEST's W4A4, before (open, its table) and after training (filled). The filled one that points up is the trained W4A8. Filled star: six trained blocks, then W8A8. Bars: 90 % intervals over seeds, cut off below at a tenth of the mean.", "name": "fig-compression-compared-main"}}
LOOKS = {
    "steps": ("0.35", "s", "fewer steps"),
    "depth": (PALETTE[1], "o", "depth"),
    "width": (PALETTE[0], "D", "width"),
    "plain bits": (PALETTE[4], "v", "bits, plain"),
    "bits": (PALETTE[2], "^", "bits, ViDiT-Q"),
    "two": (PALETTE[3], "*", "two at once"),
}
TRIVIAL = ("first", "ShortGPT", "Wanda", "plain")
MARKS = {"QuEST": (">", "QuEST, and its table"), "table": (">", ""), "ShortGPT": ("H", "ShortGPT")}
LINES = [["full model", *(f"full, {n} steps" for n in reversed(SWEEP))]]
LINES += [[f"{how} {q:.3g} %" for q in (10, 20, 30, 37.5)] for how in ("EcoDiff", "Wanda")]
LINES += [[f"{how} W{b}A{a or b}" for b in (8, 6, 4)] for how in ("plain", "ViDiT-Q") for a in (0, 8)]


def shown(name, kind):
    """Mean and interval of what is drawn; the full model's nearness to itself is not."""
    mean, low, high = (float(v) for v in mean_interval(measured[kind][name]))
    return mean, max(low, 0.1 * mean), high


fig, axes = plt.subplots(2, 2, figsize=(7, 6.6), layout="constrained", sharex="col", sharey="row")
for (row, kind), (column, label) in [
    (r, c) for r in enumerate(("psnr", "FD")) for c in enumerate(("bytes of weights", "bit operations"))
]:
    ax = axes[row, column]
    for line in LINES:
        points = [
            (share[name][column], shown(name, kind)[0])
            for name in line
            if kind == "FD" or name != "full model"
        ]
        ax.plot(
            *zip(*points, strict=True),
            color=LOOKS[ARMS[line[-1]].family][0],
            lw=1,
            alpha=0.6,
            ls="--" if "Wanda" in line[0] else "-",
        )
    for name, arm in ARMS.items():
        if name == "full model" and kind == "psnr":
            continue
        (mean, low, high), (colour, marker, _) = shown(name, kind), LOOKS[arm.family]
        ax.errorbar(
            share[name][column],
            mean,
            [[mean - low], [high - mean]],
            fmt=MARKS.get(name.split()[0], (marker,))[0],
            ms=9 if arm.family == "two" else 4.5 if name.startswith(TRIVIAL) else 6,
            mec=colour,
            mfc=colour if arm.trained else "white",
            ecolor=colour,
            elinewidth=0.8,
            capsize=0,
        )
    ax.set(xscale="log", **({"xlabel": label + ", share of the full model's"} if row else {}))
    ticks = (0.3, 0.5, 0.75, 1.0) if column == 0 else (0.1, 0.2, 0.5, 1.0)
    ax.minorticks_off()
    ax.set_xticks(ticks, [f"{100 * v:.3g} %" for v in ticks])
axes[0, 0].set_ylabel("PSNR to the full model in dB")
axes[1, 0].set(ylabel="Fréchet distance", yscale="log")
for ax in axes[1]:
    ax.axhline(floor, color="0.3", lw=1, ls=":")
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    ax.yaxis.set_minor_formatter(lambda v, _: "")
handles = [
    plt.Line2D([], [], color=c, marker=m, mfc="white", ls="", label=text) for c, m, text in LOOKS.values()
]
for colour, (marker, text) in zip((PALETTE[2], "k", PALETTE[1]), MARKS.values(), strict=True):
    handles += [plt.Line2D([], [], color=colour, marker=marker, mfc="white", ls="", label=text)] * bool(text)
for size, text in ((6, "filled: trained"), (4.5, "small: trivial choice")):
    handles.append(plt.Line2D([], [], color="k", marker="o", ms=size, ls="", label=text))
fig.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)
plt.show()

# %% [markdown]
# How to read it: in the top row higher is better, in the bottom row lower; further left is cheaper. First look up from a cost to the best point above it. Then compare the columns: a method may be best in one and useless in the other. Then compare the rows: an open and a filled point of one method at the same cost show what training does to nearness, and what to looks.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Rows of ten digits, one column a class: the full model, then fewer steps, six blocks trained, four blocks trained, a narrower model untrained and trained, and several roundings. Rounding at eight bits repeats the first row; the trained models with six blocks or fewer units draw similar but not equal digits; four blocks, trained, are rougher. The untrained narrower model is blotched and too bright, plain rounding at four bits for both weights and activations dim and rough."}, "figure": {"caption": "Samples, not chosen: the first of each class, first seed, the same noise in each column. On the right: share of bytes, share of bit operations.", "name": "fig-compression-compared-samples"}}
ROWS = [
    "full model",
    f"full, {SWEEP[-1] if s.steps < 9 else HALF} steps",
    "TinyFusion 6, trained",
    "TinyFusion 4, trained",
    "EcoDiff 37.5 %",
    "EcoDiff 37.5 %, trained",
    "ViDiT-Q W8A8",
    "ViDiT-Q W4A8",
    "ViDiT-Q W4A8, trained",
    "plain W4A4",
    "QuEST W4A4, trained",
    "6 blocks trained, W8A8",
]
fig, ax = plt.subplots(figsize=(6.8, 5.6), layout="constrained")
show_images(torch.cat([judged[name][0][-1] for name in ROWS]), 10, ax=ax, row_labels=ROWS)
height = (ax.get_ylim()[0] + 0.5) / len(ROWS)
for i, name in enumerate(ROWS):
    ax.text(
        1.02,
        1 - (i + 0.5) / len(ROWS),
        f"{share[name][0]:.0%}, {share[name][1]:.0%}",
        transform=ax.transAxes,
        va="center",
        fontsize=9,
    )
plt.show()

# %% [markdown]
# ### At equal cost
#
# Now the pairs. The table gives both costs, for most pairs are equal in one of them at most. *Masks-trained* and *gates-trained* are equal in both. *Width-depth*, *depth-and-bits*, *trained-bits* and *same-training* are equal in bytes, nearly or exactly; their bit operations differ, and in *same-training* the rival needs fewer. In the claims on steps, and in *two-at-once*, the rival has no fewer bit operations; the bytes are left out of account. In *depth-bits* and *width-bits* the rival is the *cheaper* of the two in both and trains nothing. Where there are several rivals the best counts, seed by seed, which favours the rivals a little.


# %%
def gain(ours, *rivals):
    """Nearness of ours over that of the best rival in dB, a seed."""
    return measured["psnr"][ours] - torch.stack([measured["psnr"][rival] for rival in rivals]).amax(0)


def fewer_steps(name):
    """The full model with as many solver steps as the work of an arm allows, rounded up."""
    n = max(2, equal_cost_steps(share[name][1] * s.steps, 1))
    return f"full, {n} steps" if n < s.steps else "full model"


BOTH = f"W8A8, {HALF} steps"
SIX_BITS, SIX_ALL, FOUR_BITS = [(f"ViDiT-Q {bits}", f"plain {bits}") for bits in ("W6A8", "W6A6", "W4A8")]
duels = {
    "width-depth": ("EcoDiff 37.5 %, trained", "TinyFusion 6, trained"),
    "masks-trained": ("EcoDiff 37.5 %, trained", "Wanda 37.5 %, trained"),
    "gates-trained": ("TinyFusion 6, trained", "first 6, trained", "ShortGPT 6, trained"),
    "depth-bits": ("TinyFusion 6, trained", "plain W8A8"),
    "width-bits": ("EcoDiff 37.5 %, trained", "plain W8A8"),
    "depth-and-bits": ("6 blocks trained, W8A8", *SIX_BITS),
    "trained-bits": ("QuEST W4A4, trained", *FOUR_BITS),
    "same-training": ("ViDiT-Q W4A8, trained", "QuEST W4A4, trained"),
    "steps-bits": ("ViDiT-Q W8A8", fewer_steps("ViDiT-Q W8A8")),
    "steps-depth": ("TinyFusion 6, trained", fewer_steps("TinyFusion 6, trained")),
    "steps-width": ("EcoDiff 37.5 %, trained", fewer_steps("EcoDiff 37.5 %, trained")),
    "two-at-once": (BOTH, fewer_steps(BOTH), *SIX_ALL, *FOUR_BITS),
}
lines = [
    "| claim | ours | bytes | bit operations | best of | bytes | bit operations | gain |",
    "|---|---|---|---|---|---|---|---|",
]
for claim, (ours, *rivals) in duels.items():
    run.record(claim, gain(ours, *rivals))
    costs = [", ".join(f"{share[name][k]:.1%}" for name in rivals) for k in (0, 1)]
    lines.append(
        f"| {claim} | {ours} | {share[ours][0]:.1%} | {share[ours][1]:.1%} | {'; '.join(rivals)} | {costs[0]} | {costs[1]} | {gain(ours, *rivals).mean():+.1f} dB |"
    )
run.record("equal-bytes", share["EcoDiff 37.5 %, trained"][0] / share["TinyFusion 6, trained"][0])
narrow, slow = duels["steps-width"]
run.record("looks", measured["FD"][narrow] / measured["FD"][slow])
display(Markdown("\n".join(lines)))

# %% [markdown]
# ### What to use when
#
# For each limit the best arm that keeps it, by nearness and by looks, once without and once with training. The table is computed from the means of this run. Arms that lie within each other's intervals may change places. *Untrained* means without training the network: a search for masks or blocks would count as untrained too.

# %% tags=["hide-input"]
LIMITS = {0: (0.8, 0.6, 0.45, 0.3), 1: (0.85, 0.55, 0.3, 0.16, 0.1)}


def best(column, limit, trained, kind):
    """Name and value of the best arm within a limit."""
    among = [n for n, a in ARMS.items() if share[n][column] <= limit and (trained or not a.trained)]
    if not among:
        return "none"
    mean = {n: float(measured[kind][n].mean()) for n in among}
    name = (max if kind == "psnr" else min)(mean, key=mean.get)
    return f"{name} ({mean[name]:.1f} dB)" if kind == "psnr" else f"{name} ({mean[name]:.2f})"


lines = [
    "| at most | nearest, untrained | nearest | best looks, untrained | best looks |",
    "|---|---|---|---|---|",
]
for column, limits in LIMITS.items():
    for limit in limits:
        cells = [best(column, limit, trained, kind) for kind in ("psnr", "FD") for trained in (False, True)]
        lines.append(f"| {limit:.0%} of the {('bytes', 'bit operations')[column]} | {' | '.join(cells)} |")
lines.append(
    f"\nIn brackets: PSNR to the full model, and Fréchet distance; full model {measured['FD']['full model'].mean():.2f}, floor {floor:.2f}."
)
display(Markdown("\n".join(lines)))

# %% [markdown]
# No cut model is in any line of this table, and none of the trivial choices of what to cut. By looks the top of the list is crowded: plain rounding at eight and six bits is printed with a lower mean than the full model itself. The bars in {numref}`fig-compression-compared-main` overlap, no claim was set on it, and it should not be read as a gain from rounding.
#
# And all arms in numbers, with the interval of the Fréchet distance in brackets and two more columns: nearness to a near-exact solution of the full model's own equation, and the share of digits that the classifier reads as the class asked for. The first asks whether fewer steps win only because they share the reference's own errors. The second hardly tells the arms apart until they are ruined: easy digits stay legible for long.

# %% tags=["hide-input"]
lines = [
    "| arm | bytes | bit operations | PSNR to full | to near-exact | Fréchet distance | read right |",
    "|---|---|---|---|---|---|---|",
]
for name in ARMS:
    values = [float(measured[c][name].mean()) for c in ("psnr", "exact", "FD", "right")]
    near = "equal" if name == "full model" else f"{values[0]:.1f} dB"
    _, low, high = mean_interval(measured["FD"][name])
    lines.append(
        f"| {name} | {share[name][0]:.1%} | {share[name][1]:.1%} | {near} | {values[1]:.1f} dB | {values[2]:.2f} ({low:.2f}, {high:.2f}) | {values[3]:.1%} |"
    )
display(Markdown("\n".join(lines)))

# %%
run.report()

# %% [markdown]
# ### How to read this
#
# The exact claims say that the counting is right. Of the others some were stated in the direction that would speak for a method, with a note that we expected them to fail. That they did is a result against the method, at this size and after this short training.
#
# **Bytes.** *Depth-bits* and *width-bits* let the cut models, which were trained, meet plain eight-bit rounding, which was not and needs fewer bytes. Both are **contradicted**: the rounded model is nearer, by the whole interval. A likely reason: the last bits of a weight are noise to the network, while a small network that was trained for long has few blocks or units that are. On this model the first half of the bytes should come from bits.
#
# *Depth-and-bits* asks about the bytes below that: is it better to round a smaller model to eight bits, or the weights of the whole one to six? (The bits of activations cost no bytes, so they stay at eight; the two then happen to need about the same bit operations as well.) It is **contradicted** by a wide margin: six bits for the whole model. Rounding costs the six blocks hardly anything; what they lack they lost in the cut.
#
# *Trained-bits* asks about the next stop, four bits for weights, where QuEST's training competes with keeping eight bits for activations. These cost no bytes, but they cost bit operations. It is **contradicted**: the training does not make up for the bits. It makes W4A4 a little nearer than the same rounding untrained, but its mean Fréchet distance gets *worse*, with wide bars. The training was short and in one stage, and no other length was tried here. *Same-training* gives both sides the training, and is confirmed. But this is not a test of the ranges alone: the winner has twice the bits for activations and trains all weights, QuEST a list.
#
# Not all of ViDiT-Q's rounding is ahead of plain rounding. With six bits for activations the plain model is nearer and looks better on average. With four, ViDiT-Q is nearer than plain rounding, but QuEST's table of ranges, untrained, is about as near and has the lower mean Fréchet distance. A likely reason, not tested: a range found online spans all values of a token, the others are searched and may cut off outliers, which is worth more the fewer bits there are.
#
# **Depth or width?** *Width-depth* is the match at equal bytes and equal training, each side with its learned choice. It is **inconclusive**: the narrower model is ahead on average, at less work, but not in every seed, and the interval holds zero. More seeds or a longer training might decide; neither was tried. And the answer would be for these choices: with ShortGPT's six blocks the shallower model is on average at least as near as the narrower one.
#
# *Masks-trained* and *gates-trained* ask whether the learned choice is still worth anything after training. The page of EcoDiff left that untried. Here *masks-trained* is confirmed: the lead over Wanda's rule is much smaller than before the training, and varies between seeds, but it stays. *Gates-trained* is **contradicted**: ShortGPT's six blocks, found in a forward pass, are nearer after the same training. The pilot runs had made us doubt it: where only two blocks go, there is less to choose. Two more reasons are likely. The groups forbid choices that ShortGPT may make; the page of TinyFusion has a control which shows that this matters. And the search is short here. No control for either was run on this page. At four blocks, half of the model and the paper's own share, no claim was set, but the table speaks against the learned choice too: the first four, which the groups also forbid, are nearer after training and have the lower mean Fréchet distance. Neither is near.
#
# **Work.** *Steps-bits*, *steps-depth* and *steps-width* set a method against fewer steps of the full model at no fewer bit operations. *Steps-bits* is confirmed. *Steps-depth* and *steps-width* are **contradicted**, by many decibels: who wants to save work on this model by cutting had better take fewer steps. But much of that margin is the measure's. Fewer steps share the reference's network and part of its solver error. Against the near-exact solution, in the table of all arms, the full model in fewer steps is still ahead on average, in *steps-width* by little. Mind also what a bit operation is worth on a given machine: fewer steps are faster everywhere, eight-bit products where there is an instruction for them.
#
# *Two-at-once* asks whether two savings that touch different factors of the cost should be combined before either is pushed to its end. It is confirmed, narrowly, and only as it is stated: nearness to the full model's ten steps, against rivals without training. By looks, and by nearness to the near-exact solution, ViDiT-Q's W4A8 in all ten steps is ahead of it on average, with fewer bytes, and after training it is nearer to the full model too.
#
# **Nearness and looks.** *Steps-width* and *looks* are one pair, the trained narrow model and the full one in fewer steps at no less work, judged once by nearness and once by looks. The verdicts differ. By nearness the narrow model loses clearly; by looks it is slightly better on average, but not in every seed, so *looks* is **inconclusive**. A few hundred images a seed and three seeds are too few for so small a difference. The likely reason for the disagreement: fewer steps share the network with the reference, and with it the reference's own choices for each noise. The distillation loss is met at noisy training images, not along the sampler's own way. So it asks for a good denoiser first, and for the same image only through that. Compare the two rows of {numref}`fig-compression-compared-main` for the filled points. Whoever needs the old images back, since users have tuned prompts and seeds to them, should look at the top row. Whoever needs good ones should look at the bottom.
#
# **Not tried** are *speed* and *long*: seconds, and whether the order holds after training as long as in the papers.
#
# ## What this does not show
#
# :::{admonition} What this does not show
# :class: warning
# - **Speed.** Bit operations are arithmetic, not seconds. Depth and width make a call faster on any machine, as the pages {doc}`/notebooks/05-compression/tinyfusion` and {doc}`/notebooks/05-compression/ecodiff` measured; bits do where there are kernels.
# - **Long training.** Less than a minute of training a model is a small part of what the papers spend. The order of cut models may change with more, and they probably have the most to gain.
# - **A large network.** This one has a million weights and eight blocks, and every cut tried here hurts before training. A large model may have blocks that hardly differ, heads that hardly speak, and outlying activations that make rounding harder: all three would shift the balance from bits towards cuts.
# - **The full methods.** The searches are short. Left out are TinyFusion's feature loss, QuEST's separate first stage, and ViDiT-Q's mixed precision, rotation and timestep-aware factors; the pages have them.
# - **Activations in memory.** Bytes are those of the weights. With large images the activations may need more.
# - **One model, one sampler.** Seeds vary searches, data and noise, not the network. Guidance, which multiplies errors, is off.
# :::
#
# ## Exercises
#
# **1.** Half precision is not the only thing to compare with. Suppose the model is stored in 32 bits. Which shares of {numref}`fig-compression-compared-main` change, and does any order?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 1", "code_prompt_hide": "Solution 1"}
for name, keep, bits in (("six blocks", 6, None), ("W8A8", 8, ("token", 8, 8)), ("W4A8", 8, ("token", 4, 8))):
    net = drop_blocks(model, tuple(range(keep)))
    for width in (2, 4):
        memory = weight_memory(net, rules_of(*bits) if bits else (), float_bytes=width)
        print(
            f"{name:11s} {8 * width} bits: {(memory.weights + memory.scales) / (width * count_parameters(model)):.1%} of the bytes"
        )
# Depth and width keep their shares. Those of bits are about halved, but for scales, biases and what stays in floating point. So papers
# that count from 32 bits flatter bits by a factor of two. The order of the arms cannot change in their disfavour.

# %% [markdown]
# **2.** Two savings that touch different factors multiply. Which pairs on this page do, in bytes and in bit operations? Compute the share of six blocks at W8A8 from the shares of its parts. Why does it not quite fit?

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Solution 2", "code_prompt_hide": "Solution 2"}
for k, what in enumerate(("bytes", "bit operations")):
    product = share["TinyFusion 6, trained"][k] * share["ViDiT-Q W8A8"][k]
    print(f"{what:15s} product {product:.2%}, counted {share['6 blocks trained, W8A8'][k]:.2%}")
# Steps with anything: bit operations multiply exactly, fewer steps do not change bytes. Cuts with bits: both, nearly. Bytes: what
# is neither cut nor rounded (the label embedding) weighs a little more in the smaller model. Bit operations: attention's products
# are not rounded, but are cut with the blocks, and the ends are not cut; so attention weighs a little less in the smaller model.

# %% [markdown]
# **3.** A colleague needs a model at about half of the bytes by tomorrow, has no training data, and images must stay what they are. Another has a week, data, and a phone without integer products. What do you tell them?
#
# :::{dropdown} Solution 3: in words
# The first: bits. Round to eight bits, weights and activations, with ranges found online. No data but a few prompts, no training, and of all arms at that size the one that stays nearest to where it was.
#
# The second gains nothing in time from bits without products for them, though the file shrinks. First take fewer solver steps, which needs no training, as far as the images allow. Then cut depth or width and train for the week; which of the two, the run above leaves open (*width-depth* is inconclusive), and a week is not a minute. So try both, and a cheap choice of what to cut beside the learned one. At the end store the weights in eight bits for the file.
# :::
#
# ## References
#
# The methods: {cite:t}`tinyfusion`, {cite:t}`ecodiff`, {cite:t}`quest`, {cite:t}`vidit-q`, each on its page. The rivals: {cite:t}`men2025shortgpt`, {cite:t}`sun2024simple`, {cite:t}`lu2022dpm`. Balancing: {cite:t}`xiao2023smoothquant`. The transformer: {cite:t}`peebles2023scalable`.
