"""The zoo: small pretrained models that ship with the library, each with a checksum and a model card.

``zoo.toml`` names, for every checkpoint, its file, size and sha256, the class and configuration that rebuild it, the recipe
that trained it and what was measured. A file that does not match is an error, never a retry.

Command line::

    python -m minilib.zoo list
    python -m minilib.zoo check NAME
    python -m minilib.zoo train NAME        # or: accelerate launch -m minilib.zoo train NAME
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilib.resources import atomic_write, zoo_dir
from minilib.verified import (
    ChecksumMismatch,
    MissingFile,
    TruncatedFile,
    VerificationError,
    VerifiedTable,
)

__all__ = [
    "ChecksumMismatch",
    "MissingFile",
    "TruncatedFile",
    "UnknownCheckpoint",
    "ZooError",
    "checksum",
    "entries",
    "entry",
    "load",
    "main",
    "names",
    "publish",
    "read",
]


ZooError = VerificationError
"""Something is wrong with a checkpoint; the message says what to do."""


class UnknownCheckpoint(ZooError, KeyError):
    """No checkpoint of that name."""

    __str__ = RuntimeError.__str__


_TABLE = VerifiedTable(
    file="zoo.toml",
    folder=lambda: zoo_dir(),  # looked up at each call, as the folder can be set
    kind="checkpoint",
    unknown=UnknownCheckpoint,
    remedy="restore it from the repository, or train it again: python -m minilib.zoo train {name}",
)

entries, names, entry = _TABLE.entries, _TABLE.names, _TABLE.entry
checksum, read = _TABLE.checksum, _TABLE.read


def load(name: str, device: torch.device | str = "cpu", root: Path | None = None) -> nn.Module:
    """A checkpoint as a model in eval mode, in float32.

    Raises:
        UnknownCheckpoint, MissingFile, TruncatedFile, ChecksumMismatch: each says what was found and what to do.
    """
    from safetensors.torch import load as load_tensors

    from minilib import models

    data = read(name, root)
    item = entry(name, root)
    model = getattr(models, item["class"])(**item["config"])
    model.load_state_dict({key: value.float() for key, value in load_tensors(data).items()})
    return model.to(device).eval().requires_grad_(False)


def publish(
    name: str,
    model: nn.Module,
    *,
    metadata: dict[str, Any],
    card: str,
    picture: bytes | None = None,
    half: bool = False,
    root: Path | None = None,
) -> None:
    """Write weights, model card, picture (a PNG) and entry.

    The entry comes last: until then the old one does not match, and loading refuses.
    """
    import tomli_w
    from safetensors.torch import save

    root = root or zoo_dir()
    dtype = torch.float16 if half else torch.float32
    state = {key: value.detach().cpu().to(dtype).contiguous() for key, value in model.state_dict().items()}
    data = save(state)
    known = entries(root)
    known[name] = {
        "file": f"{name}.safetensors",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "class": type(model).__name__,
        "config": {
            key: value for key, value in model.config.items() if value is not None
        },  # TOML has no null
        **metadata,
    }
    atomic_write(root / f"{name}.safetensors", data)
    atomic_write(root / f"{name}.md", card)
    if picture:
        atomic_write(root / f"{name}.png", picture)
    atomic_write(root / "zoo.toml", tomli_w.dumps(dict(sorted(known.items()))))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m minilib.zoo", description="Small pretrained models that ship here."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names, sizes and headline metrics")
    check = commands.add_parser("check", help="verify checkpoints against zoo.toml")
    check.add_argument("names", nargs="*")
    train = commands.add_parser(
        "train", help="train a checkpoint again and write its weights, card and entry"
    )
    train.add_argument("name")
    train.add_argument(
        "--steps", type=int, help="other than the recipe's number of steps (a trial; give --out too)"
    )
    train.add_argument("--out", type=Path, help="folder to write to (default: the zoo itself)")
    train.add_argument(
        "--work", type=Path, default=Path("runs/zoo"), help="folder for checkpoints of an unfinished run"
    )
    args = parser.parse_args(argv)
    try:
        if args.command == "list":
            for name, item in entries().items():
                print(f"{name:20s} {item['bytes'] / 1e6:5.1f} MB  {item.get('summary', '')}")
        elif args.command == "check":
            for name in args.names or names():
                read(name)
                print(f"{name}: ok")
        else:
            from minilib.recipes import train as train_recipe

            train_recipe(args.name, steps=args.steps, out=args.out, work=args.work)
    except ZooError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # Run as a script this module is a second copy; the recipes raise the errors of the first.
    from minilib import zoo

    sys.exit(zoo.main())
