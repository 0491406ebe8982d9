"""The workflow files of the forge: valid, and doing nothing that the Makefile does not do."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

REPO = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((REPO / ".github/workflows").glob("*.yml"))
COMMAND = re.compile(r"make ([a-z]+)((?: [A-Z]+=\S*)*)")


def check_schema(schema: str, path: Path) -> None:
    script = Path(sys.executable).parent / "check-jsonschema"
    done = subprocess.run([script, "--builtin-schema", schema, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def commands(path: Path) -> list[tuple[str, dict[str, str]]]:
    """The make targets and variables of a workflow's steps; any other command is a failure."""
    found = []
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        for step in job["steps"]:
            if "run" in step:
                match = COMMAND.fullmatch(step["run"].strip())
                assert match, f"{path.name}: {step['run']!r} is not one make target"
                found.append((match[1], dict(pair.split("=", 1) for pair in match[2].split())))
    return found


def makefile() -> tuple[set[str], set[str]]:
    """Targets of the Makefile, and the variables that it lets a caller set."""
    text = (REPO / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", text, flags=re.MULTILINE))
    return targets, set(re.findall(r"^(?:export )?([A-Z_]+) *\?=", text, flags=re.MULTILINE))


def test_there_are_three():
    assert [path.stem for path in WORKFLOWS] == ["drift", "publish", "test"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_schema(path):
    check_schema("vendor.github-workflows", path)


def test_schema_check_can_fail(tmp_path):
    bad = tmp_path / "bad.yml"
    bad.write_text(WORKFLOWS[0].read_text().replace("runs-on:", "run-on:"))
    with pytest.raises(AssertionError):
        check_schema("vendor.github-workflows", bad)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_steps_are_make_targets(path):
    targets, variables = makefile()
    for target, settings in commands(path):
        assert target in targets
        assert set(settings) <= variables
        constraints = settings.get("CONSTRAINTS")
        assert not constraints or (REPO / constraints).is_file()


def test_what_each_does():
    does = {path.stem: commands(path) for path in WORKFLOWS}
    assert does["test"] == [("test", {}), ("book", {})]
    assert does["publish"] == [("book", {})]
    assert {target for target, _ in does["drift"]} == {"test", "book"}
    assert ("test", {"CONSTRAINTS": "", "RESOLUTION": "lowest-direct"}) in does["drift"]
    assert ("test", {"CONSTRAINTS": ""}) in does["drift"]
    assert ("test", {"CONSTRAINTS": ".github/colab-constraints.txt"}) in does["drift"]


def test_published_folder_is_the_one_that_make_book_fills():
    for name in ("publish", "test"):
        assert "path: build/site/html\n" in (REPO / f".github/workflows/{name}.yml").read_text()
    assert '/ "site"' in (REPO / "book/build.py").read_text()


def test_drift_comes_weekly_and_only_publishing_may_write():
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        writes = {name for name, right in workflow["permissions"].items() if right == "write"}
        assert writes == ({"pages", "id-token"} if path.stem == "publish" else set())
        # YAML 1.1 reads the key `on` as true.
        assert ("schedule" in workflow[True]) == (path.stem == "drift")


def test_colab_snapshot_is_within_our_ranges():
    lines = (REPO / ".github/colab-constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {pin.name: next(iter(pin.specifier)) for pin in pins}
    assert all(specifier.operator == "==" for specifier in versions.values())
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    ours = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for needed in map(Requirement, ours):
        if needed.name in versions:
            assert versions[needed.name].version in needed.specifier, needed
    assert {"torch", "numpy", "einops", "pydantic"} <= set(versions)


def test_citation_file():
    check_schema("vendor.citation-file-format", REPO / "CITATION.cff")
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
    assert citation["repository-code"] == project["urls"]["Repository"]
    assert citation["license"] == project["license"]["text"]
