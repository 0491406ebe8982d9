"""Keys: what changes them, what must not, and that they are the same everywhere."""

import ast

import jupytext
import pytest

from minilib import keys
from minilib.cards import Card

CLAIM = {"id": "sum", "statement": "s", "paper": "p", "kind": "exact", "metric": "m", "direction": "at_most"}
CARD = {
    "slug": "alpha",
    "title": "Alpha",
    "part": "00-foundations",
    "summary": "s",
    "stands_in": "s",
    "claims": [{**CLAIM, "threshold": 1.0, "asserted_in": ["cpu"]}],
}
TEXT = '''# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # A page
# with $x = 1$

# %% tags=["parameters"]
profile = "auto"

# %%
def f(x: int) -> int:
    """Twice."""
    return 2 * x  # doubled


# %% [md]
# Prose.

# %% tags=["hide-input"]
# %pip install nothing
y = f(
    2
)

# %%
print("# not a comment", y)
'''


def card(**changes):
    return Card.model_validate(CARD | changes)


def page_key(text=TEXT, settings=None, **changes):
    return keys.page_key(text, card(**changes), settings or {"steps": 3})


def test_cells_are_jupytexts():
    parsed = jupytext.reads(TEXT, fmt="py:percent")
    theirs = [cell.source for cell in parsed.cells if cell.cell_type == "code"]
    ours = keys.code_cells(TEXT)
    assert len(ours) == 4
    assert [cell.replace("# %pip", "%pip") for cell in ours] == theirs


def test_page_key_is_the_same_everywhere():
    # Pinned: another machine, Python or day must find the same key.
    assert page_key() == "daf979809f913d723215aab23825723a6a3b34b3c5b20ee8190741eacd3609b0"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# with $x = 1$", "# with $x = 2$"),
        ("# Prose.", "# Other prose.\n#\n# More of it."),
        ("  # doubled", "  # twice as much"),
        ('"""Twice."""', '"""Twice as much.\n\n    Really.\n    """'),
        ('tags=["hide-input"]', 'tags=["hide-output"]'),
        ("    return 2", "\n    return 2"),
    ],
)
def test_prose_leaves_the_page_key(old, new):
    assert old in TEXT
    assert page_key(TEXT.replace(old, new)) == page_key()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("2 * x", "3 * x"),
        ('"# not a comment"', '"# not a  comment"'),
        ("# %%\nprint", "print"),  # two cells become one
        ('profile = "auto"', 'profile = "cpu"'),
    ],
)
def test_code_changes_the_page_key(old, new):
    assert old in TEXT
    assert page_key(TEXT.replace(old, new)) != page_key()


def test_claims_and_settings_change_the_page_key():
    claims = [{**CLAIM, "threshold": 2.0, "asserted_in": ["cpu"]}]
    assert page_key(claims=claims) != page_key()
    assert page_key(settings={"steps": 4}) != page_key()
    assert page_key(title="Another title", summary="other", mem_mb=1) == page_key()


@pytest.mark.parametrize(
    ("source", "stripped"),
    [
        ('"""Module."""\nx = 1\n', "x = 1"),
        ("x = '# no comment'  # comment\n", "x = '# no comment'"),
        ('class A:\n    "Doc."\n    y = """kept"""\n', 'class A:\n    y = """kept"""'),
        ('é = "ü"  # ß\nz = 1  # ö\n', 'é = "ü"\nz = 1'),
        ('async def f():\n    """Böse."""; return 1\n', "async def f():\n    ; return 1"),
        ("x = [\n    1,  # one\n\n    2,\n]\n", "x = [\n    1,\n    2,\n]"),
        ("not python at all: %magic\n", "not python at all: %magic"),
        ("", ""),
    ],
)
def test_prose_is_stripped(source, stripped):
    assert keys.strip_prose(source) == stripped


def bare(tree):
    """A syntax tree without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
    return ast.dump(tree)


def test_stripping_keeps_the_meaning_of_this_library():
    compared = 0
    for path in sorted(keys.PACKAGE.rglob("*.py")):
        source = path.read_text()
        try:
            stripped = ast.parse(keys.strip_prose(source))
        except SyntaxError:
            continue  # some body was a docstring alone and is now empty: enough for a key, not for a parser
        assert ast.dump(stripped) == bare(ast.parse(source)), path
        compared += 1
    assert compared > 10


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A little minilib: a imports b.c relatively, d lazily; e is alone."""
    root = tmp_path / "minilib"
    files = {
        "__init__.py": "",
        "a.py": "from .b.c import f\n\ndef g():\n    from minilib import d\n    return d\n",
        "b/__init__.py": "from . import c\n",
        "b/c.py": '"""Doc."""\nimport math\n\ndef f():\n    return 1  # one\n',
        "d.py": "from minilib.reproduction import Reproduction\n",
        "e.py": "import minilib.e\n",
        "reproduction.py": "import json\n",
    }
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# made by a tool\nnumpy==2\n")
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    (zoo / "zoo.toml").write_text('[tiny]\nsha256 = "aa"\n[other]\nsha256 = "bb"\n')
    monkeypatch.setattr(keys, "constraints_path", lambda: constraints)
    monkeypatch.setattr(keys, "zoo_dir", lambda: zoo)
    return root


def test_imports_are_followed_without_importing(package):
    found = keys.imported_modules("import os\nfrom minilib import a\n", package)
    assert set(found) == {
        "minilib",
        "minilib.a",
        "minilib.b",
        "minilib.b.c",
        "minilib.d",
        "minilib.reproduction",
    }
    assert found["minilib.b.c"] == package / "b/c.py" and found["minilib.b"] == package / "b/__init__.py"
    assert set(keys.imported_modules("import minilib.b.c as c\n", package)) == {
        "minilib",
        "minilib.b",
        "minilib.b.c",
    }
    assert keys.imported_modules("import numpy, minilibrary\n", package) == {}


def library_key(package, modules=("minilib.a", "minilib.b.c"), zoo=("tiny",)):
    return keys.library_key(modules, zoo, package)


def test_library_key_follows_code_constraints_and_checkpoints(package, tmp_path):
    seen = {library_key(package)}

    def changes(path, text):
        path.write_text(text)
        key = library_key(package)
        fresh = key not in seen
        seen.add(key)
        return fresh

    assert not changes(package / "b/c.py", '"""Other words."""\nimport math\n\n\ndef f():\n    return 1\n')
    assert not changes(package / "e.py", "x = 2\n")
    assert not changes(tmp_path / "constraints.txt", "# made by another tool\nnumpy==2  # pinned\n")
    assert not changes(
        tmp_path / "zoo/zoo.toml", '[tiny]\nsha256 = "aa"\nsummary = "x"\n[other]\nsha256 = "cc"\n'
    )
    assert changes(package / "b/c.py", "import math\n\ndef f():\n    return 2\n")
    assert changes(tmp_path / "constraints.txt", "numpy==3\n")
    assert changes(tmp_path / "zoo/zoo.toml", '[tiny]\nsha256 = "dd"\n')
    (package / "b/c.py").unlink()
    assert library_key(package) not in seen, "a module that is gone has changed"


def test_library_key_ignores_order_and_bookkeeping(package):
    key = library_key(package)
    assert library_key(package, ("minilib.b.c", "minilib.a", "minilib.a")) == key
    assert library_key(package, ("minilib.a", "minilib.b.c", "minilib.reproduction", "minilib.tables")) == key
    assert library_key(package, ("minilib.a",)) != key
    assert library_key(package, zoo=()) != key


def test_an_unknown_checkpoint_is_refused(package):
    assert keys.zoo_checksums(card(zoo=["tiny"])) == {"tiny": "aa"}
    with pytest.raises(ValueError, match="'huge'.*listed: other, tiny"):
        keys.zoo_checksums(card(zoo=["huge"]))


def test_bookkeeping_modules_exist():
    for name in keys.BOOKKEEPING:
        assert keys.module_path(name), f"{name} is no module; remove it from BOOKKEEPING"


@pytest.mark.parametrize("package", ["attention", "data", "metrics", "models", "recipes"])
def test_a_table_of_contents_has_no_code_of_its_own(package):
    """Its changes do not count for the library key, so it may only say where things are."""
    tree = ast.parse((keys.PACKAGE / package / "__init__.py").read_text())
    for node in tree.body[1:]:
        is_attach = isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("lazy.attach(")
        assert isinstance(node, ast.Import | ast.ImportFrom) or is_attach, ast.unparse(node)


@pytest.mark.parametrize("package", ["attention", "data", "metrics", "models", "recipes"])
def test_what_a_table_of_contents_promises_is_there(package):
    import importlib
    import types

    module = importlib.import_module(f"minilib.{package}")
    assert module.__all__
    for name in module.__all__:
        value = getattr(module, name)
        # A function must not be hidden by the module of the same name.
        if isinstance(value, types.ModuleType):
            assert value.__name__ == f"minilib.{package}.{name}" and not hasattr(value, name)
