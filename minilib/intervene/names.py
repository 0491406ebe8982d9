"""Parts of a model by name: exact names, globs or regular expressions over ``named_modules()``."""

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

Pattern = str | re.Pattern[str]
Names = Pattern | Iterable[Pattern]


def named_blocks(model: nn.Module, pattern: Names) -> dict[str, nn.Module]:
    """The modules of ``model`` whose names match, in the order of ``model.named_modules()``.

    Args:
        model: any module.
        pattern: an exact name; a glob, in which ``*``, ``?`` and ``[0-3]`` stay within one part of a name
            and ``**`` stands for any number of parts; a compiled regular expression that matches the whole
            name; or several of these. The model itself has the name ``""``.

    Returns:
        the modules by name. A module that the model holds under two names appears once, under the first that
        matches.

    Raises:
        ValueError: a pattern matches nothing; the message lists names that come near.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.GELU()))
    >>> list(named_blocks(model, "*")), list(named_blocks(model, "**.0")), list(named_blocks(model, "1.*"))
    (['0', '1'], ['0', '1.0'], ['1.0', '1.1'])
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = set(matching_names(modules, pattern, f"module of {type(model).__name__}"))
    chosen: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, module in modules.items():
        if name in wanted and id(module) not in seen:
            seen.add(id(module))
            chosen[name] = module
    return chosen


def running_blocks(model: nn.Module, pattern: Names) -> dict[str, nn.Module]:
    """``named_blocks`` without the containers, such as a ``ModuleList``, which are never called: no hook sees them.

    Raises:
        ValueError: a pattern matches nothing, or containers only.
    """
    patterns = [pattern] if isinstance(pattern, str | re.Pattern) else list(pattern)
    for one in patterns:
        found = named_blocks(model, one)
        if not any(_runs(module) for module in found.values()):
            name, module = next(iter(found.items()))
            inside = [f"{name}.{child}" for child, _ in module.named_children()][:5]
            raise ValueError(
                f"{name!r} is a container, a {type(module).__name__}, which is never called itself: name what is inside, "
                f"such as {', '.join(map(repr, inside))}"
            )
    return {name: module for name, module in named_blocks(model, patterns).items() if _runs(module)}


def matching_names(names: Iterable[str], pattern: Names, what: str) -> list[str]:
    """Those of ``names`` that match; ``what`` says in the error what they name.

    Raises:
        ValueError: a pattern matches nothing, or there is no pattern.
    """
    names = list(names)
    patterns = [pattern] if isinstance(pattern, str | re.Pattern) else list(pattern)
    if not patterns:
        raise ValueError(f"no name of a {what} given: give at least one")
    wanted: set[str] = set()
    for one in patterns:
        found = [name for name in names if matches(one, name)]
        if not found:
            text = one if isinstance(one, str) else one.pattern
            raise ValueError(f"no {what} is called {text!r}: {_near(text, names)}")
        wanted.update(found)
    return [name for name in names if name in wanted]


def matches(pattern: Pattern, name: str) -> bool:
    """Whether ``name`` matches one glob or regular expression.

    >>> matches("blocks.*", "blocks.3"), matches("blocks.*", "blocks.3.attn"), matches("**.attn", "blocks.3.attn")
    (True, False, True)
    """
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    if pattern == "" or name == "":
        return pattern == name
    return _parts_match(pattern.split("."), name.split("."))


def refuse_nested(names: Iterable[str], doing: str) -> None:
    """Raise if one of ``names`` lies inside another.

    Raises:
        ValueError: ``a.b`` and ``a`` are both there.
    """
    names = list(names)
    for outer in names:
        for inner in names:
            if inner != outer and (outer == "" or inner.startswith(outer + ".")):
                raise ValueError(f"{inner!r} lies inside {outer or 'the model'!r}: {doing} one of the two")


def find_parameter(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns the parameter ``name``, and the parameter's own name in it.

    Raises:
        ValueError: there is no such parameter; the message lists names that come near.
    """
    names = [found for found, _ in model.named_parameters(remove_duplicate=False)]
    if name not in names:
        raise ValueError(f"no parameter of {type(model).__name__} is called {name!r}: {_near(name, names)}")
    owner, _, own = name.rpartition(".")
    return model.get_submodule(owner), own


def _runs(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _parts_match(pattern: list[str], parts: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_parts_match(pattern[1:], parts[i:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _parts_match(pattern[1:], parts[1:])


def _near(text: str, names: list[str]) -> str:
    near = difflib.get_close_matches(text, names, n=5, cutoff=0.5)
    listed = near or [name for name in names if name][:5]
    return (
        f"names that come {'near' if near else 'first'}: {', '.join(map(repr, listed)) or 'there are none'}"
    )
