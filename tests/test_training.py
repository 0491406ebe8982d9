import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from minilib.models import DiT
from minilib.training import FitConfig, fit, progress_wanted, step_generator, update_ema

HERE = Path(__file__).parent


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def make_batch(generator, n):
    x = torch.randn(n, 3, generator=generator)
    return {"x": x, "y": x.sum(1, keepdim=True)}


def loss(model, batch):
    return ((model(batch["x"]) - batch["y"]) ** 2).mean()


CONFIG = FitConfig(steps=60, batch_size=16, lr=1e-2, warmup=5)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.state_dict().values()])


def test_fit_learns_and_is_a_function_of_its_seed():
    a, b = (fit(tiny(), loss, make_batch, CONFIG, device="cpu") for _ in range(2))
    assert torch.equal(weights(a.model), weights(b.model)) and a.history == b.history
    assert len(a.history) == 60 and a.history[-1] < 0.2 * a.history[0]
    other = fit(
        tiny(), loss, make_batch, FitConfig(steps=60, batch_size=16, lr=1e-2, warmup=5, seed=1), device="cpu"
    )
    assert not torch.equal(weights(a.model), weights(other.model))


def test_fit_equals_a_loop_written_out():
    """The same recipe by hand: plain AdamW, clipping, schedule and EMA."""
    model, ema = tiny(), tiny()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=CONFIG.betas, weight_decay=0.0, fused=False
    )
    for step in range(CONFIG.steps):
        warm = min(1.0, (step + 1) / 5)
        decay = min(1.0, (60 - step) / (0.4 * 60))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * warm * decay
        optimizer.zero_grad()
        loss(model, make_batch(step_generator(0, step), 16)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        d = min(CONFIG.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for e, p in zip(ema.parameters(), model.parameters(), strict=True):
                e.copy_(d * e + (1 - d) * p)
    result = fit(tiny(), loss, make_batch, CONFIG, device="cpu")
    assert (weights(result.model) - weights(model)).abs().max() < 1e-5
    assert (weights(result.ema) - weights(ema)).abs().max() < 1e-5


def test_resume_ends_with_the_identical_weights(tmp_path):
    whole = fit(tiny(), loss, make_batch, CONFIG, device="cpu")

    def interrupt(step, ema, value):
        if step == 40:
            raise KeyboardInterrupt

    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(
            tiny(), loss, make_batch, CONFIG, device="cpu",
            checkpoint=path, checkpoint_every=25, callback=interrupt, callback_every=10,
        )  # fmt: skip
    seen = []

    def watched(generator, n):
        seen.append(n)
        return make_batch(generator, n)

    torch.manual_seed(123)  # the global random state plays no part
    resumed = fit(tiny(), loss, watched, CONFIG, device="cpu", checkpoint=path, checkpoint_every=25)
    assert len(seen) == 35  # from step 25 on
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert torch.equal(weights(whole.ema), weights(resumed.ema))
    assert whole.history == resumed.history
    # a finished run is only loaded
    seen.clear()
    again = fit(tiny(), loss, watched, CONFIG, device="cpu", checkpoint=path)
    assert not seen and torch.equal(weights(again.ema), weights(whole.ema))
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    fit(tiny(), loss, make_batch, FitConfig(steps=2), device="cpu", checkpoint=path)
    with pytest.raises(ValueError, match="another recipe"):
        fit(tiny(), loss, make_batch, FitConfig(steps=3), device="cpu", checkpoint=path)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    def explode(model, batch):
        explode.calls += 1
        return loss(model, batch) * (math.nan if explode.calls == 8 else 1.0)

    explode.calls = 0
    with pytest.raises(FloatingPointError, match="step 7"):
        fit(tiny(), explode, make_batch, FitConfig(steps=20), device="cpu")


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"decay_fraction": 2.0},
        {"ema_decay": 1.0},
        {"mixed_precision": "fp16"},
    ],
)
def test_recipes_out_of_range_are_refused(bad):
    with pytest.raises(ValueError):
        FitConfig(**({"steps": 3} | bad))


def test_schedule_warms_up_holds_and_decays():
    config = FitConfig(steps=1000, warmup=100, decay_fraction=0.4)
    assert config.lr_factor(0) == 0.01 and config.lr_factor(99) == 1.0 and config.lr_factor(600) == 1.0
    assert config.lr_factor(800) == pytest.approx(0.5) and config.lr_factor(999) == pytest.approx(1 / 400)
    assert FitConfig(steps=10, warmup=0, decay_fraction=0.0).lr_factor(9) == 1.0


def test_ema_follows_buffers_and_short_runs():
    model, ema = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.running_mean.fill_(7.0)
    update_ema(ema, model, 0.999, step=0)
    assert torch.allclose(ema.weight, torch.tensor(0.1 * 1 + 0.9 * 2.0)) and ema.running_mean[0] == 7


def test_bf16_trains_and_attention_stays_fp32():
    torch.manual_seed(0)
    model = DiT(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3, learn_sigma=False)
    seen = []
    block = model.blocks[0].attn
    inner = block.processor
    block.processor = lambda q, k, v, **kw: (
        seen.append((q.dtype, torch.is_autocast_enabled("cpu"))),
        inner(q, k, v, **kw),
    )[1]

    x, noise = torch.randn(2, 64, 1, 4, 4)
    data = {"x0": x, "y": torch.zeros(64, dtype=torch.long), "noise": noise, "t": 1000 * torch.rand(64)}

    from minilib.losses import flow_matching_loss

    out = []
    handle = model.blocks[0].attn.qkv.register_forward_hook(lambda m, a, o: out.append(o.dtype))
    result = fit(
        model, flow_matching_loss, lambda g, n: data, FitConfig(steps=3, mixed_precision="bf16"), device="cpu"
    )
    handle.remove()
    assert out and set(out) == {torch.bfloat16} and all(on for _, on in seen)
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    from minilib.attention import full_attention

    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = torch.randn(1, 2, 5, 8).bfloat16()
        mixed = full_attention(q, q, q)
    exact = full_attention(q.float(), q.float(), q.float())
    assert (mixed.float() - exact).abs().max() < 1e-6 or mixed.dtype == torch.bfloat16


LAUNCHED = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_training import CONFIG, FitConfig, fit, loss, make_batch, tiny, weights
from accelerate import PartialState
from safetensors.torch import save_file
grads = []
model = tiny()
def watch(step, ema, value):
    pass
config = FitConfig(steps=3, batch_size=32, lr=1e-2, warmup=0, clip=0.0)
handles = []
original = torch.optim.AdamW.step
def spy(self, *a, **k):
    grads.append(torch.cat([p.grad.flatten().clone() for g in self.param_groups for p in g["params"]]))
    return original(self, *a, **k)
torch.optim.AdamW.step = spy
result = fit(model, loss, make_batch, config, device="cpu")
state = PartialState()
if state.is_main_process:
    world = torch.tensor(state.num_processes)
    save_file({"grads": torch.stack(grads), "weights": weights(result.model), "world": world}, sys.argv[1])
"""


def test_two_processes_give_the_gradients_of_one_with_the_doubled_batch(tmp_path):
    from safetensors.torch import load_file

    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    env = os.environ | {"MINILIB_TYPECHECK": "0", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    outs = {}
    for world in (1, 2):
        out = tmp_path / f"{world}.safetensors"
        command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={world}",
                   # without mpirun, this flag is how accelerate starts several CPU processes: through torchrun
                   *(["--multi_gpu"] if world > 1 else ["--cpu"]),
                   "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
                   f"--main_process_port={29500 + os.getpid() % 400}",
                   str(script), str(out), str(HERE)]  # fmt: skip
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        outs[world] = load_file(out)
    assert int(outs[2]["world"]) == 2
    assert (outs[1]["grads"] - outs[2]["grads"]).abs().max() < 1e-6
    assert (outs[1]["weights"] - outs[2]["weights"]).abs().max() < 1e-6


def test_a_batch_that_does_not_divide_is_refused():
    from minilib.training import _share

    class Two:
        num_processes, process_index = 2, 1

    assert _share(8, Two()) == slice(4, 8)
    with pytest.raises(ValueError, match="multiple of 2"):
        _share(7, Two())


def test_progress_is_quiet_where_nobody_watches(monkeypatch, capfd):
    monkeypatch.delenv("MINILIB_PROGRESS", raising=False)
    monkeypatch.setenv("CI", "true")
    assert not progress_wanted()
    fit(tiny(), loss, make_batch, FitConfig(steps=3), device="cpu", progress="training")
    assert "training" not in capfd.readouterr().err
    monkeypatch.setenv("MINILIB_PROGRESS", "1")
    fit(tiny(), loss, make_batch, FitConfig(steps=3), device="cpu", progress="training")
    assert "training" in capfd.readouterr().err


def test_checkpoint_is_readable_json_and_tensors_only(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "a.safetensors"
    fit(tiny(), loss, make_batch, FitConfig(steps=2), device="cpu", checkpoint=path)
    with safe_open(str(path), "pt") as file:
        assert json.loads(file.metadata()["config"])["steps"] == 2 and file.metadata()["step"] == "2"
        assert {k.split(".")[0] for k in file.keys()} == {"model", "ema", "optimizer", "history"}
