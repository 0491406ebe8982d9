"""``python -m minilib.data.build NAME --from FOLDER [--out FOLDER]``: build an asset from the packages in a folder."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from minilib.data.build.tools import BuildError, publish

_TOOLS = ("__init__", "__main__", "tools")


def builders() -> list[str]:
    """Names of all assets that have a build script."""
    found = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return sorted(name for name in found.difference(_TOOLS) if not name.startswith("_"))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m minilib.data.build",
        description="Build a vendored data asset from published packages.",
    )
    parser.add_argument("name", help=f"one of {', '.join(builders())}")
    parser.add_argument(
        "--from", dest="folder", type=Path, required=True, help="folder with the source archives"
    )
    parser.add_argument("--out", type=Path, help="folder to write to (default: the library's own)")
    args = parser.parse_args(argv)
    try:
        if args.name not in builders():
            raise BuildError(f"no build script for {args.name!r}; known: {', '.join(builders())}")
        built = importlib.import_module(f"minilib.data.build.{args.name}").build(args.folder)
        publish(args.name, built, args.out)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.name}: {len(built.data) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
