"""What a page talks to: its card, its settings, its device, its recorder and the verdicts.

>>> run = Reproduction("deepcache", profile)               # doctest: +SKIP
>>> run.record("speedup", [2.1, 2.0, 2.2])                 # doctest: +SKIP
>>> run.report()                                           # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilib import machine, tables
from minilib.cards import PROFILES, Amendment, Card, CardError, Claim, all_cards, load_card
from minilib.keys import zoo_checksums
from minilib.resources import atomic_write
from minilib.verdicts import VERDICTS, summarise, t_interval, verdict

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEVICES",
    "MIME",
    "PROFILES",
    "VERDICTS",
    "Amendment",
    "Card",
    "CardError",
    "Claim",
    "ClaimFailed",
    "Reproduction",
    "all_cards",
    "load_card",
    "resolve_device",
    "resolve_profile",
    "t_interval",
    "verdict",
]

DEVICES = ("auto", "cpu", "cuda", "mps")
MIME = "application/vnd.minilib.record+json"


class ClaimFailed(AssertionError):
    """A run that must not be published: an asserted claim was not recorded, or an exact claim does not hold."""


def resolve_profile(profile: str = "auto") -> str:
    """The profile to run: the one named; else ``MINILIB_PROFILE``; else gpu where there is one, else cpu."""
    given, source = profile, "profile"
    if profile == "auto" and os.environ.get("MINILIB_PROFILE", "auto") != "auto":
        given, source = os.environ["MINILIB_PROFILE"], "the environment variable MINILIB_PROFILE"
    if given == "auto":
        return "gpu" if resolve_device("auto").type == "cuda" else "cpu"
    if given not in PROFILES:
        raise ValueError(f"{source} is {given!r}; expected one of: auto, {', '.join(PROFILES)}")
    return given


def resolve_device(device: str = "auto") -> torch.device:
    """The device to run on; "auto" is CUDA where there is one, else the processor.

    Raises ValueError for a name that is not known, or a device that is not there.
    """
    kind = device.split(":")[0]
    if kind not in DEVICES:
        raise ValueError(f"device is {device!r}; expected one of: {', '.join(DEVICES)} (or cuda:1 and so on)")
    import torch

    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind == "auto":
        return torch.device("cuda" if has["cuda"] else "cpu")
    if not has[kind]:
        there = ", ".join(name for name, available in has.items() if available)
        raise ValueError(f"device is {device!r}, which this machine does not have; it has: {there}")
    return torch.device(device)


def _plain(value: Any) -> Any:
    """Settings as JSON holds them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _as_floats(claim_id: str, values: Any) -> list[float]:
    """One float a seed, from a number, a list, an array or a tensor of at most one dimension."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        values = [values]
    try:
        floats = [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(f"record({claim_id!r}): expected one number a seed, got {values!r}") from None
    if not floats or not all(math.isfinite(value) for value in floats):
        raise ValueError(f"record({claim_id!r}): expected finite numbers, one a seed; got {floats}")
    return floats


def _data_used() -> dict[str, Any]:
    """The data sets this process has loaded, with source and checksums; looks only if the data package is loaded already."""
    provenance = sys.modules.get("minilib.data.provenance")
    return provenance.used() if provenance is not None else {}


def _show(html: str, text: str, extra: Mapping[str, Any] | None = None) -> None:
    """Display in a notebook, print elsewhere."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        print(text)
        return
    from IPython.display import display

    display({"text/html": html, "text/plain": text, **(extra or {})}, raw=True)


class Reproduction:
    """One run of one page.

    ``settings`` maps each profile to an instance of one frozen dataclass (or is one instance for all profiles).
    """

    def __init__(
        self,
        slug: str,
        profile: str = "auto",
        settings: Any = None,
        device: str = "auto",
        root: str | Path | None = None,
    ) -> None:
        self.card: Card = load_card(slug, root)
        self.profile: str = resolve_profile(profile)
        self._all_settings = self._check_settings(settings)
        self.settings: Any = self._all_settings.get(self.profile)
        if device.split(":")[0] not in DEVICES:
            resolve_device(device)  # refuses it, with the list
        self._device = device
        # Refused now rather than after ten minutes of work.
        self._zoo = zoo_checksums(self.card)
        self._values: dict[str, list[float]] = {}
        self._not_tried: dict[str, str] = {}
        self._started = time.time()
        self._clock = time.perf_counter()

    @functools.cached_property
    def device(self) -> torch.device:
        """Where to compute: the processor, except in the gpu profile. Looked up at first use, since torch loads slowly."""
        if self._device != "auto":
            return resolve_device(self._device)
        if self.profile != "gpu":
            return resolve_device("cpu")
        found = resolve_device("auto")
        if found.type == "cpu":
            print(
                "The gpu profile runs on the processor here: no GPU was found. It will take long.",
                file=sys.stderr,
            )
        return found

    def _check_settings(self, settings: Any) -> dict[str, Any]:
        if settings is None:
            return {}
        if not isinstance(settings, Mapping):
            settings = dict.fromkeys(PROFILES, settings)
        if self.profile not in settings:
            known = ", ".join(settings)
            raise ValueError(f"settings has no entry for profile {self.profile!r}; it has: {known}. Add one.")
        unknown = set(settings) - set(PROFILES)
        if unknown:
            raise ValueError(
                f"settings names the unknown profile {unknown.pop()!r}; known: {', '.join(PROFILES)}"
            )
        kinds = {type(value) for value in settings.values()}
        kind = kinds.pop()
        if kinds or not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:
            raise ValueError(
                "settings: expected instances of one dataclass, made with @dataclass(frozen=True)"
            )
        return dict(settings)

    def _plain_settings(self) -> dict[str, dict[str, Any]]:
        return {name: _plain(dataclasses.asdict(value)) for name, value in self._all_settings.items()}

    def show_settings(self) -> None:
        """Show the settings of every profile, this run's in bold."""
        settings = self._plain_settings()
        _show(tables.settings_html(settings, self.profile), tables.settings_text(settings, self.profile))

    def show_card(self) -> None:
        """Show the paper's card: what it claims, what stands in for what, the thresholds."""
        _show(tables.card_html(self.card), tables.card_text(self.card))

    def asserted(self, claim: Claim) -> bool:
        """Whether this run must record the claim."""
        return claim.not_tried is None and self.profile in (claim.asserted_in or ())

    def record(self, claim_id: str, values: Any) -> None:
        """Record a claim's values: one a seed, or one number for an exact claim.

        Refuses a claim the card lacks or calls untried, a second recording, values that are not finite, and fewer values
        than the card's ``seeds`` where this profile asserts the claim.
        """
        claim = self._open_claim("record", claim_id)
        floats = _as_floats(claim_id, values)
        if self.asserted(claim) and len(floats) < claim.seeds:
            raise ValueError(
                f"record({claim_id!r}): {len(floats)} values, but the card asks for {claim.seeds} seeds"
            )
        self._values[claim_id] = floats

    def not_tried(self, claim_id: str, reason: str) -> None:
        """Say that this run cannot try a claim, and why: what it needs is not on this machine.

        The report then shows the reason in the place of a verdict, and does not miss the claim. Such a run is not
        published. Refuses a claim the card lacks or calls untried, one that has been recorded, and an empty reason.
        """
        self._open_claim("not_tried", claim_id)
        if not reason.strip():
            raise ValueError(f"not_tried({claim_id!r}): give the reason, and what would have to be installed")
        self._not_tried[claim_id] = reason

    def _open_claim(self, call: str, claim_id: str) -> Claim:
        """The claim, if this run may still say something of it."""
        try:
            claim = self.card.claim(claim_id)
        except KeyError as error:
            raise ValueError(f"{call}: {error.args[0]}") from None
        if claim.not_tried is not None:
            raise ValueError(
                f"{call}({claim_id!r}): the card calls it untried ({claim.not_tried}); change the card first"
            )
        if claim_id in self._values:
            raise ValueError(f"{call}({claim_id!r}): recorded already; a claim is recorded once in a run")
        if claim_id in self._not_tried:
            raise ValueError(
                f"{call}({claim_id!r}): this run called it untried already ({self._not_tried[claim_id]})"
            )
        return claim

    def as_record(self) -> dict[str, Any]:
        """The record of this run so far, as JSON holds it. Publishing adds the keys and the commit."""
        # The device's name alone would not say which GPU; a run that never asked for one was on the processor.
        device = self.__dict__.get("device")
        gpu = machine.gpu_model() if device is not None and device.type == "cuda" else None
        return {
            "slug": self.card.slug,
            "profile": self.profile,
            "device": f"{device} ({gpu})" if gpu else str(device or "cpu"),
            "settings": self._plain_settings().get(self.profile, {}),
            "claims": {claim.id: self._entry(claim) for claim in self.card.claims},
            "wall_s": round(time.perf_counter() - self._clock, 4),
            "peak_mb": machine.peak_mb(),
            "threads": machine.threads(),
            "machine": f"{machine.cpu_model()}, {gpu}" if gpu else machine.cpu_model(),
            "versions": machine.versions(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "modules": sorted(name for name in sys.modules if name.split(".")[0] == "minilib"),
            "zoo": self._zoo,
            "data": _data_used(),
        }

    def _entry(self, claim: Claim) -> dict[str, Any]:
        entry = summarise(claim, self._values.get(claim.id, []))
        reason = self._not_tried.get(claim.id)
        return entry if reason is None else entry | {"not_tried": reason}

    def report(self) -> None:
        """Show the claims table and leave the record in the notebook.

        Then raises ClaimFailed if an asserted claim was not recorded, or if an exact claim does not hold. Any other
        verdict is a result and stops nothing.
        """
        record = self.as_record()
        _show(tables.claims_html(self.card, record), tables.claims_text(self.card, record), {MIME: record})
        said = self._values.keys() | self._not_tried.keys()
        missing = [c.id for c in self.card.claims if self.asserted(c) and c.id not in said]
        broken = [
            c.id
            for c in self.card.claims
            if c.kind == "exact" and record["claims"][c.id]["verdict"] == "contradicted"
        ]
        if missing:
            raise ClaimFailed(
                f"{self.card.slug}: asserted in {self.profile} but not recorded: {', '.join(missing)}"
            )
        if broken:
            raise ClaimFailed(f"{self.card.slug}: exact claims that do not hold (a bug): {', '.join(broken)}")
        self._leave_receipt(record)

    def _leave_receipt(self, record: Mapping[str, Any]) -> None:
        """Proof, for whoever asked by ``MINILIB_RECEIPTS``, that the page ran to its report."""
        folder = os.environ.get("MINILIB_RECEIPTS")
        if not folder:
            return
        receipt = {
            "slug": self.card.slug,
            "profile": self.profile,
            "wall_s": record["wall_s"],
            "started": self._started,
            "recorded": sorted(self._values),
            **({"not_tried": sorted(self._not_tried)} if self._not_tried else {}),
        }
        atomic_write(Path(folder) / f"{self.card.slug}.json", json.dumps(receipt, indent=1) + "\n")
