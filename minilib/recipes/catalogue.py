"""All recipes by name, and the one function that carries one out."""

from __future__ import annotations

from pathlib import Path

from minilib import zoo
from minilib.recipes import digits, digits_p2, emoji, generators, mnist, shapes, vae, vit
from minilib.recipes.base import Recipe, carry_out

RECIPES: dict[str, Recipe] = {
    **digits.RECIPES,
    **digits_p2.RECIPES,
    **mnist.RECIPES,
    **shapes.RECIPES,
    **generators.RECIPES,
    **emoji.RECIPES,
    **vae.RECIPES,
    **vit.RECIPES,
}


def train(
    name: str, *, steps: int | None = None, out: Path | None = None, work: Path = Path("runs/zoo")
) -> None:
    """Carry out a recipe by its name; see :func:`minilib.recipes.base.carry_out`.

    Raises:
        minilib.zoo.UnknownCheckpoint: no recipe of that name.
    """
    if name not in RECIPES:
        raise zoo.UnknownCheckpoint(f"no recipe for {name!r}; known: {', '.join(sorted(RECIPES))}")
    carry_out(name, RECIPES[name], steps=steps, out=out, work=work)
