"""How each zoo model is trained and judged; ``python -m minilib.zoo train NAME`` carries a recipe out.

Training sees the training split only. Settings were chosen on the validation split. The figures in the model cards are measured
on the test split, once, at the end.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "base": ["Recipe"],
        "catalogue": ["RECIPES", "train"],
        "digits": ["ddpm_scheduler", "judge_digits", "sample_digits", "sampling_scheduler"],
    },
)
