"""Everything about a model that an intervention could leave behind, to compare before and after."""

import torch
from torch import nn

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def structure(model: nn.Module) -> dict:
    """Identity, class, attributes, hooks, processor and parameters of every module, and which require gradients."""
    return {
        name: (
            id(module),
            type(module),
            sorted(vars(module)),
            [list(getattr(module, hooks).items()) for hooks in HOOKS],
            list(module._modules),
            {k: (id(p), p.requires_grad) for k, p in module._parameters.items() if p is not None},
            id(getattr(module, "processor", None)),
            module.training,
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def bits(model: nn.Module) -> dict:
    """Copies of all values."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: tuple[dict, dict]) -> None:
    """The model is what it was when ``(structure(model), bits(model))`` was taken."""
    assert structure(model) == before[0]
    now = model.state_dict()
    assert list(now) == list(before[1])
    assert all(torch.equal(now[name], value) for name, value in before[1].items())
