"""How noise goes in and comes out: noise schedules, the forward process, solvers; in diffusers' protocol and names.

    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    scheduler.set_timesteps(50)
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample

A pipeline of diffusers runs on these schedulers, and ``from_config`` takes a config from either side. Reading order:
:mod:`.schedules` (how much noise), :mod:`.noising` (x_0 to x_t), :mod:`.conversion` (what the network predicts), :mod:`.ddpm`
and :mod:`.ddim` on :mod:`.transitions`; :mod:`.euler`, :mod:`.heun`, :mod:`.dpmsolver` on :mod:`.sigmas`; :mod:`.flow_match`.

Where diffusers 0.42.1 is otherwise, by issue number ("-": none is known). Each line has a test in closed form.

- 9261, 11347, 12633: DDIM steps to ``t - T // N`` whatever the spacing, the wrong level for linspace, and for trailing where N
  does not divide T. Here the next level is the next row of the table.
- 12771: DPM-Solver++ with Karras' sigmas on the cosine schedule begins at the second of several equal timesteps and runs out of
  its table. Here steps are counted from the first.
- 13243: flow matching shifts the smallest sigma twice. Here once.
- "-": DDPM adds noise in its last step unless that is t = 0 (trailing spacing, ``steps_offset``). Here never in the last step.
- "-": trailing spacing gives N + 1 timesteps, the last one -1, for 62 of the first 1000 N (61, 103, ...). Here N.
- "-": ``DPMSolverMultistepScheduler.add_noise`` before ``set_timesteps`` reads its table backwards. Here abar_t.
- "-": ``EulerDiscreteScheduler.get_velocity`` reads ``alphas_cumprod`` by place in ``timesteps``. Here by noise level.
- "-": DPM-Solver++ takes ``[:, :3]`` of a network with learned variances. Here the first half of its 2c channels.
- "-": zero terminal SNR with epsilon prediction divides by 0 (DDPM, DDIM). Here an error says so.
- "-": DPM-Solver++ takes a t that is not in ``timesteps`` for the last one. Here an error says so.

- "-": Heun and Euler write ``x + dt d``, which loses four digits in float32 from a sigma of 20,000 (cosine schedule, t = 999).
  Here the step is an interpolation between x and x_0, which subtracts nothing large.

Coefficients are float64 here and float32 there. Samples in float16 or bfloat16 are stepped in float32 and rounded back.
"""

from .base import Config, Scheduler, SchedulerOutput
from .conversion import PREDICTION_TYPES, predict_x0, prediction_target
from .ddim import DDIMScheduler
from .ddpm import VARIANCE_TYPES, DDPMScheduler
from .densities import TIMESTEP_DENSITIES, TimestepDensity, timestep_density
from .dpmsolver import DPMSolverMultistepScheduler
from .euler import EulerDiscreteScheduler
from .flow_match import FlowMatchEulerDiscreteScheduler, shift_sigmas
from .heun import HeunDiscreteScheduler
from .inversion import ddim_inversion
from .posterior import ddpm_posterior, gaussian_kl, learned_range_log_variance, predicted_posterior
from .schedules import BETA_SCHEDULES, TIMESTEP_SPACINGS, karras_sigmas, make_betas, rescale_zero_terminal_snr

SCHEDULERS: dict[str, type[Scheduler]] = {
    kind.__name__: kind
    for kind in (
        DDPMScheduler,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
    )
}

__all__ = [
    "BETA_SCHEDULES",
    "PREDICTION_TYPES",
    "SCHEDULERS",
    "TIMESTEP_DENSITIES",
    "TIMESTEP_SPACINGS",
    "VARIANCE_TYPES",
    "Config",
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "Scheduler",
    "SchedulerOutput",
    "TimestepDensity",
    "ddim_inversion",
    "ddpm_posterior",
    "gaussian_kl",
    "karras_sigmas",
    "learned_range_log_variance",
    "make_betas",
    "predict_x0",
    "predicted_posterior",
    "prediction_target",
    "rescale_zero_terminal_snr",
    "shift_sigmas",
    "timestep_density",
]
