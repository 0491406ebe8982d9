"""Keys that tell whether a record still belongs to its page and to the library.

``page_key`` changes when the page's code, its claims or its settings change: the page must run again.
``library_key`` changes when code the page used, the constraints or a checkpoint changes: the book says so.
Comments, docstrings and markdown are in neither, so that prose can be edited freely.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import tokenize
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minilib.cards import Card
from minilib.resources import constraints_path, zoo_dir

PACKAGE = Path(__file__).resolve().parent
# These write numbers down and lay tables out; they do not make numbers. Verdicts are recomputed by `publish check`.
BOOKKEEPING = frozenset(
    f"minilib.{name}"
    for name in (
        *("cards", "consistency", "execution", "keys", "machine", "pages", "publish"),
        *("reproduction", "resources", "tables", "verdicts"),
    )
)
# Tables of contents and of names: what they lead to is hashed, they themselves compute nothing.
CONTENTS = frozenset(
    f"minilib.{name}"
    for name in ("attention", "data", "data.provenance", "data.registry", "metrics", "models", "recipes")
)
_HEADER = re.compile(r"^# %%(.*)$")


def strip_prose(source: str) -> str:
    """Python source without comments, docstrings and blank lines; source that is not Python comes back as it is.

    >>> strip_prose('def f(x):\\n    "Docstring."\\n    return x  # why\\n')
    'def f(x):\\n    return x'
    """
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return source.strip()
    # ast counts columns in bytes, tokenize in characters: work in bytes throughout.
    lines = [line.encode() for line in source.split("\n")]
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][: len(token.line[:column].encode())]
    # Blank lines and trailing spaces inside a string belong to its value.
    in_string = {row - 1 for t in tokens if t.type == tokenize.STRING for row in range(t.start[0], t.end[0])}
    for node in _docstrings(tree):
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        in_string -= set(range(first, last + 1))
        head, tail = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        lines[first : last + 1] = [head + tail] + [b""] * (last - first)
    kept = (
        (line.decode() if row in in_string else line.decode().rstrip(), row) for row, line in enumerate(lines)
    )
    return "\n".join(line for line, row in kept if line or row in in_string)


def _docstrings(tree: ast.Module) -> Iterable[ast.Expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    yield first


def code_cells(text: str) -> list[str]:
    """Sources of the code cells of a page's text (py:percent), in order, without surrounding blank lines."""
    cells: list[list[str]] = []
    current: list[str] | None = None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header is None:
            if current is not None:
                current.append(line)
            continue
        is_prose = re.search(r"\[(markdown|md|raw)\]", header.group(1))
        current = None if is_prose else []
        if current is not None:
            cells.append(current)
    sources = ("\n".join(cell).strip() for cell in cells)
    return [source for source in sources if source]


def _digest(payload: Any) -> str:
    raw = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(raw.encode()).hexdigest()


def page_key(text: str, card: Card, settings: Mapping[str, Any]) -> str:
    """sha256 over the page's code cells, its claims and the settings it ran with (as the record holds them)."""
    cells = [code for code in map(strip_prose, code_cells(text)) if code]
    # Defaults are left out: a new optional key of the card format must not outdate every record.
    claims = [claim.model_dump(mode="json", exclude_defaults=True) for claim in card.claims]
    return _digest({"cells": cells, "claims": claims, "settings": dict(settings)})


def library_key(modules: Iterable[str], zoo: Iterable[str] = (), package: Path | None = None) -> str:
    """sha256 over the code of the named minilib modules, the constraints and the checksums of the named checkpoints.

    A module that no longer exists counts as changed. ``package`` is minilib's folder, by default this one's.
    """
    sources: dict[str, str | None] = {}
    for name in sorted(set(modules) - BOOKKEEPING - CONTENTS):
        path = module_path(name, package or PACKAGE)
        sources[name] = strip_prose(path.read_text(encoding="utf-8")) if path else None
    lines = (
        line.split("#")[0].strip() for line in constraints_path().read_text(encoding="utf-8").splitlines()
    )
    checksums = known_checksums()
    zoo_sums = {name: checksums.get(name) for name in sorted(zoo)}
    return _digest({"modules": sources, "constraints": [line for line in lines if line], "zoo": zoo_sums})


def known_checksums() -> dict[str, str]:
    """sha256 of every checkpoint that ``zoo.toml`` lists; empty where there is no zoo yet."""
    path = zoo_dir() / "zoo.toml"
    if not path.is_file():
        return {}
    entries = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        name: entry["sha256"]
        for name, entry in entries.items()
        if isinstance(entry, dict) and "sha256" in entry
    }


def zoo_checksums(card: Card) -> dict[str, str]:
    """Checksums of the checkpoints a card names; an unknown checkpoint is refused by name."""
    known = known_checksums()
    for name in card.zoo:
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise ValueError(
                f"{card.slug}: `zoo` names {name!r}, which zoo.toml does not list; listed: {listed}"
            )
    return {name: known[name] for name in card.zoo}


def module_path(name: str, package: Path = PACKAGE) -> Path | None:
    """Source file of a module of minilib, or None where there is no such module."""
    base = package.joinpath(*name.split(".")[1:])
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file() and name.split(".")[0] == "minilib":
            return path
    return None


def imported_modules(source: str, package: Path = PACKAGE) -> dict[str, Path]:
    """Modules of minilib that a Python source imports, directly or through other modules, with their files.

    Read from the syntax tree, nothing is imported. An import inside a function counts.
    """
    found: dict[str, Path] = {}
    todo = list(_imports(source, "", package))
    while todo:
        name = todo.pop()
        path = module_path(name, package)
        if path is None or name in found:
            continue
        found[name] = path
        here = name if path.name == "__init__.py" else name.rpartition(".")[0]
        todo += _imports(path.read_text(encoding="utf-8"), here, package)
    return dict(sorted(found.items()))


def _imports(source: str, here: str, package: Path) -> Iterable[str]:
    """Names of minilib modules in the import statements of a source; ``here`` is the package it is in."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = here.split(".")[: len(here.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "minilib":
                # Importing a.b.c runs a and a.b first.
                yield from (".".join(parts[: i + 1]) for i in range(len(parts)))
