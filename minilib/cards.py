"""Paper cards: what a paper claims, what is tried here, and the thresholds, written down before the run.

A card is ``reproductions/<slug>/paper.toml``. Every mistake in it is refused with the file, the key and the remedy.
"""

from __future__ import annotations

import datetime
import difflib
import math
import tomllib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from minilib.resources import reproductions_dir

PROFILES = ("smoke", "cpu", "gpu")
MINUTES = {"smoke": 1.0, "cpu": 10.0, "gpu": 60.0}
FOUNDATIONS = "00-foundations"
CLOSING = "-compared"
"""How the slug of a part's closing page ends: the page that compares the methods of the part."""
_EXAMPLES = {
    "threshold": "threshold = 1.5",
    "null": "null = 1.0",
    "asserted_in": 'asserted_in = ["cpu", "gpu"]',
}


class CardError(ValueError):
    """A card that cannot be used; the message names the file, the key and the remedy."""


def _known(names: Iterable[Any]) -> str:
    return ", ".join(str(name) for name in names) or "none"


def check_profiles(names: Iterable[str], key: str) -> None:
    """Refuse a profile name that does not exist."""
    for name in names:
        if name not in PROFILES:
            raise ValueError(
                f"`{key}` names the unknown profile {name!r}; known profiles: {_known(PROFILES)}"
            )


class Claim(BaseModel):
    """One claim of a paper that can be tried, with its threshold. ``not_tried`` gives the reason where it is not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    statement: str = Field(min_length=1)
    paper: str = Field(min_length=1)
    kind: Literal["exact", "quality", "cost"]
    metric: str | None = None
    direction: Literal["at_least", "at_most", "within"] | None = None
    threshold: float | tuple[float, float] | None = None
    null: float | None = None
    seeds: int = Field(default=1, ge=1)
    asserted_in: tuple[str, ...] | None = None
    not_tried: str | None = Field(default=None, min_length=1)

    @field_validator("threshold", mode="before")
    @classmethod
    def _is_number_or_pair(cls, value: Any) -> Any:
        items = value if isinstance(value, list | tuple) else [value]
        numbers = all(
            isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in items
        )
        if value is not None and (not numbers or (items is value and len(items) != 2)):
            raise ValueError(
                f"it is {value!r}; give one finite number, or [low, high] for direction = 'within'"
            )
        return value

    @model_validator(mode="after")
    def _is_complete(self) -> Claim:
        if self.not_tried is not None:
            if self.asserted_in:
                raise ValueError("`asserted_in` contradicts `not_tried`; remove one of the two")
            return self
        for key in ("metric", "direction", "threshold", "asserted_in"):
            if getattr(self, key) is None:
                hint = _EXAMPLES.get(key, f'{key} = "..."')
                raise ValueError(f"`{key}` is missing; add it, for example: {hint}")
        check_profiles(self.asserted_in or (), "asserted_in")
        self._check_threshold()
        if self.kind != "exact" and "smoke" in self.asserted_in:
            raise ValueError(
                f"`asserted_in` has 'smoke', but only exact claims are asserted there; this is {self.kind}"
            )
        return self

    def _check_threshold(self) -> None:
        pair = isinstance(self.threshold, tuple)
        if self.direction == "within":
            if not pair:
                raise ValueError(
                    f"`threshold` is {self.threshold}; direction 'within' takes a pair: [low, high]"
                )
            low, high = self.threshold
            if low > high or (low == high and self.kind != "exact"):
                raise ValueError(f"`threshold` is [{low}, {high}]; the first number must be below the second")
            return
        if pair:
            raise ValueError(f"`threshold` is a pair; direction {self.direction!r} takes one number")
        if self.kind == "exact":
            return
        if self.null is None:
            hint = _EXAMPLES["null"]
            raise ValueError(
                f"`null` is missing; a {self.kind} claim needs the value of 'no effect', say {hint}"
            )
        past = self.null > self.threshold if self.direction == "at_least" else self.null < self.threshold
        if past or not math.isfinite(self.null):
            raise ValueError(
                f"`null` is {self.null}: with direction {self.direction!r} it must not lie past the threshold "
                f"{self.threshold}, or 'no effect' would count as confirmation"
            )


class Amendment(BaseModel):
    """A change made to a claim after its first run, with the reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: datetime.date
    claim: str
    change: str = Field(min_length=1)
    reason: str = Field(min_length=1)


class Card(BaseModel):
    """A paper's card. ``slug`` is folder, notebook, URL and citation key; ``order`` the place in its part."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    slug: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str = Field(min_length=1)
    authors: tuple[str, ...] = ()
    year: int | None = Field(default=None, ge=1900, le=2100)
    arxiv: str | None = Field(default=None, pattern=r"^(\d{4}\.\d{4,5}|[a-z-]+/\d{7})$")
    part: str = Field(pattern=r"^\d\d-[a-z0-9-]+$")
    order: int = 0
    summary: str = Field(min_length=1)
    stands_in: str = Field(min_length=1)
    claims: tuple[Claim, ...] = Field(min_length=1)
    amendments: tuple[Amendment, ...] = ()
    zoo: tuple[str, ...] = ()
    minutes: dict[str, float] = Field(default_factory=lambda: dict(MINUTES))
    mem_mb: int = Field(default=3000, gt=0)
    official_code: tuple[str, ...] = ()

    @field_validator("minutes")
    @classmethod
    def _fill_minutes(cls, value: dict[str, float]) -> dict[str, float]:
        check_profiles(value, "minutes")
        if any(v <= 0 for v in value.values()):
            raise ValueError("every budget must be above 0 minutes")
        return {**MINUTES, **value}

    @model_validator(mode="after")
    def _is_consistent(self) -> Card:
        ours = self.part == FOUNDATIONS or self.slug.endswith(CLOSING)
        if not ours and not (self.authors and self.year):
            raise ValueError(
                "`authors` and `year` are needed for a paper; only pages of "
                f"{FOUNDATIONS} and the closing page of a part (slug ending in {CLOSING!r}) go without"
            )
        ids = [claim.id for claim in self.claims]
        twice = [name for name, count in Counter(ids).items() if count > 1]
        if twice:
            raise ValueError(f"`claims` has the id {twice[0]!r} twice; give each claim its own id")
        for amendment in self.amendments:
            if amendment.claim not in ids:
                raise ValueError(
                    f"`amendments` names the unknown claim {amendment.claim!r}; known: {_known(ids)}"
                )
        return self

    def claim(self, claim_id: str) -> Claim:
        """The claim of that id; an unknown id is refused by name."""
        for claim in self.claims:
            if claim.id == claim_id:
                return claim
        raise KeyError(
            f"{self.slug}: no claim {claim_id!r} on its card; known: {_known(c.id for c in self.claims)}"
        )

    @property
    def notebook(self) -> str:
        """Path of the committed notebook, relative to the repository."""
        return f"notebooks/{self.part}/{self.slug}.ipynb"

    @property
    def text(self) -> str:
        """Path of the page's text (py:percent), relative to the repository."""
        return f"notebooks/{self.part}/{self.slug}.py"


def _where(loc: tuple[int | str, ...], raw: dict[str, Any]) -> str:
    """A key a person can find: ``claims[1] (id 'speedup').threshold``."""
    names: list[str] = []
    node: Any = raw
    for key in loc:
        try:
            node = node[key]
        except (KeyError, IndexError, TypeError):
            node = None
        if isinstance(key, int) and names:
            tag = f" (id {node['id']!r})" if isinstance(node, dict) and "id" in node else ""
            names[-1] += f"[{key}]{tag}"
        else:
            names.append(str(key))
    return ".".join(names) or "the card"


def _explain(error: Any, raw: dict[str, Any]) -> str:
    loc = tuple(error["loc"])
    where = _where(loc, raw)
    if error["type"] == "extra_forbidden":
        model = {"claims": Claim, "amendments": Amendment}.get(str(loc[0]), Card) if len(loc) > 1 else Card
        close = difflib.get_close_matches(str(loc[-1]), model.model_fields, 1)
        hint = f"did you mean `{close[0]}`? " if close else ""
        return f"{where}: unknown key; {hint}known keys: {_known(model.model_fields)}"
    if error["type"] == "missing":
        return f"{where}: is missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] == "value_error" else f" (given: {error['input']!r})"
    return f"{where}: {message}{given}"


def _folder(root: str | Path | None) -> Path:
    return Path(root) / "reproductions" if root is not None else reproductions_dir()


def slugs(root: str | Path | None = None) -> list[str]:
    """Names of all folders that hold a card, sorted."""
    return sorted(path.parent.name for path in _folder(root).glob("*/paper.toml"))


def load_card(slug: str, root: str | Path | None = None) -> Card:
    """Read and check the card of one paper.

    ``root`` is the checkout to read from; without it, the checkout or wheel minilib is imported from.
    Raises CardError with the file, the key and the remedy.
    """
    folder = _folder(root)
    path = folder / slug / "paper.toml"
    if not path.is_file():
        close = difflib.get_close_matches(slug, slugs(root), 1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise CardError(
            f"{path}: no such card. {hint}Known slugs: {_known(slugs(root))}. Write the card there first."
        )
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CardError(f"{path}: not valid TOML: {error}") from None
    try:
        card = Card.model_validate(raw)
    except ValidationError as error:
        lines = [f"{path}: {_explain(e, raw)}" for e in error.errors()]
        raise CardError("\n".join(lines)) from None
    if card.slug != slug:
        raise CardError(
            f"{path}: slug: it is {card.slug!r} but the folder is {slug!r}; make the two the same"
        )
    return card


def all_cards(root: str | Path | None = None) -> list[Card]:
    """Every card, sorted by part, then by order in the part, then by slug."""
    return sorted((load_card(slug, root) for slug in slugs(root)), key=lambda c: (c.part, c.order, c.slug))
