"""Cards refuse what is wrong and say how to mend it; the recorder refuses what would mislead."""

import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch

from minilib import reproduction, tables
from minilib.reproduction import (
    MIME,
    CardError,
    ClaimFailed,
    Reproduction,
    all_cards,
    load_card,
    resolve_device,
    resolve_profile,
)

CARD = """slug = "alpha"
title = "Alpha & <Omega>"
authors = ["A. Author", "B. Author"]
year = 2024
arxiv = "2312.00858"
part = "04-caching"
summary = "One idea."
stands_in = "Digits stand in for photographs."

[[claims]]
id = "sum"
statement = "One and one are two"
paper = "2"
kind = "exact"
metric = "sum"
direction = "at_most"
threshold = 0.3
asserted_in = ["smoke", "cpu", "gpu"]

[[claims]]
id = "speed"
statement = "It is faster"
paper = "2.3x"
kind = "quality"
metric = "ratio"
direction = "at_least"
threshold = 1.5
null = 1.0
seeds = 3
asserted_in = ["cpu", "gpu"]

[[claims]]
id = "seen"
statement = "It is nicer"
paper = "nicer"
kind = "quality"
metric = "difference"
direction = "within"
threshold = [-1, 1.0]
seeds = 2
asserted_in = []

[[claims]]
id = "large"
statement = "It scales"
paper = "FID 2.1"
kind = "quality"
not_tried = "it needs a large model"
"""


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...]
    lr: float = 1e-3
    name: str = "a"


SETTINGS = {"smoke": Settings((0,)), "cpu": Settings((0, 1, 2)), "gpu": Settings((0, 1, 2), 1e-4)}


def write_card(root, text=CARD, slug="alpha"):
    path = root / "reproductions" / slug / "paper.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


@pytest.fixture
def root(tmp_path):
    return write_card(tmp_path)


@pytest.fixture
def run(root):
    return Reproduction("alpha", "cpu", SETTINGS, root=root)


def test_a_good_card(root):
    card = load_card("alpha", root)
    assert card.claim("speed").threshold == 1.5 and card.claim("seen").threshold == (-1.0, 1.0)
    assert card.claim("large").asserted_in is None and card.claim("seen").null is None
    assert card.minutes == {"smoke": 1, "cpu": 10, "gpu": 60} and card.mem_mb == 3000
    assert (
        card.text == "notebooks/04-caching/alpha.py" and card.notebook == "notebooks/04-caching/alpha.ipynb"
    )
    with pytest.raises(KeyError, match="'speeed'.*known: sum, speed, seen, large"):
        card.claim("speeed")


AMENDED = (
    '[[amendments]]\ndate = 2024-05-01\nclaim = "{}"\nchange = "1.4 -> 1.5"\nreason = "A pilot was wrong."\n'
)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "seeds = 3",
            "seedz = 3",
            r"claims\[1\] \(id 'speed'\)\.seedz: unknown key; did you mean `seeds`\? known keys: id",
        ),
        ("part =", 'colour = "red"\npart =', r"colour: unknown key; known keys: slug"),
        ('id = "speed"', 'id = "sum"', r"`claims` has the id 'sum' twice"),
        (
            "threshold = 1.5",
            "",
            r"claims\[1\] \(id 'speed'\): `threshold` is missing; add it.*threshold = 1\.5",
        ),
        ('metric = "ratio"', "", r"\(id 'speed'\): `metric` is missing"),
        ("null = 1.0", "", r"\(id 'speed'\): `null` is missing; a quality claim needs .*null = 1\.0"),
        ("null = 1.0", "null = 2.0", r"`null` is 2.0: .*must not lie past the threshold 1.5"),
        ('direction = "at_least"', "", "`direction` is missing"),
        ('slug = "alpha"', 'slug = "beta"', "slug: it is 'beta' but the folder is 'alpha'"),
        ('slug = "alpha"', "", "slug: is missing; add it"),
        (
            '["cpu", "gpu"]',
            '["cpu", "tpu"]',
            r"'speed'\): `asserted_in` names the unknown profile 'tpu'; .*smoke, cpu, gpu",
        ),
        ('["cpu", "gpu"]', '["smoke", "cpu"]', "`asserted_in` has 'smoke', but only exact claims"),
        (
            "threshold = [-1, 1.0]",
            "threshold = 1.0",
            r"'seen'\): `threshold` is 1.0; direction 'within' takes a pair",
        ),
        ("threshold = [-1, 1.0]", "threshold = [1.0, 1.0]", "the first number must be below the second"),
        (
            "threshold = [-1, 1.0]",
            "threshold = [1.0]",
            r"\.threshold: it is \[1.0\]; give one finite number, or \[low",
        ),
        (
            "threshold = 1.5",
            "threshold = [1, 2]",
            "`threshold` is a pair; direction 'at_least' takes one number",
        ),
        ("threshold = 1.5", "threshold = nan", "it is nan; give one finite number"),
        ("threshold = 1.5", "threshold = true", "it is True; give one finite number"),
        (
            '"at_least"',
            '"more"',
            r"claims\[1\] \(id 'speed'\)\.direction: .*'at_least', 'at_most' or 'within' \(given: 'more'\)",
        ),
        ("seeds = 3", "seeds = 0", r"\.seeds: .*greater than or equal to 1 \(given: 0\)"),
        ("year = 2024", "", "`authors` and `year` are needed for a paper; only pages of 00-foundations"),
        ('arxiv = "2312.00858"', 'arxiv = "arXiv:2312.00858"', r"arxiv: .*\(given: 'arXiv:2312.00858'\)"),
        ("part =", "minutes = {tpu = 3}\npart =", "`minutes` names the unknown profile 'tpu'"),
        (
            'not_tried = "it needs',
            'asserted_in = ["cpu"]\nnot_tried = "it needs',
            "`asserted_in` contradicts `not_tried`",
        ),
        (
            '"it needs a large model"\n',
            '"it needs"\n\n' + AMENDED.format("gone"),
            "`amendments` names the unknown claim 'gone'",
        ),
        ("year = 2024", "year = ", "not valid TOML: .*line 4"),
    ],
)
def test_a_bad_card_names_file_key_and_remedy(root, old, new, message):
    assert CARD.count(old) >= 1
    write_card(root, CARD.replace(old, new, 1))
    with pytest.raises(CardError, match=message) as caught:
        load_card("alpha", root)
    assert str(root / "reproductions/alpha/paper.toml") in str(caught.value)


def test_all_mistakes_are_told_at_once(root):
    write_card(root, CARD.replace("threshold = 1.5", "").replace("seeds = 2", "seedz = 2"))
    with pytest.raises(CardError) as caught:
        load_card("alpha", root)
    assert len(str(caught.value).splitlines()) == 2


def test_a_slug_that_is_no_folder(root):
    with pytest.raises(
        CardError, match="no such card. Did you mean 'alpha'. Known slugs: alpha. Write the card there"
    ):
        load_card("alpa", root)


def test_amendments(root):
    write_card(root, CARD)
    assert "written down before the first run<" in tables.card_html(load_card("alpha", root))
    write_card(root, CARD + AMENDED.format("speed"))
    assert load_card("alpha", root).amendments[0].date.isoformat() == "2024-05-01"
    assert "written down before the first run; amended since: speed<" in tables.card_html(
        load_card("alpha", root)
    )
    for key in ("change", "reason"):
        write_card(
            root, CARD + "\n".join(x for x in AMENDED.format("speed").splitlines() if not x.startswith(key))
        )
        with pytest.raises(CardError, match=rf"amendments\[0\]\.{key}: is missing"):
            load_card("alpha", root)


def test_cards_come_by_part_and_order(root):
    foundation = CARD.replace("04-caching", "00-foundations").replace("year = 2024", "")
    write_card(root, foundation.replace('"alpha"', '"zeta"').replace("part", "order = 2\npart"), "zeta")
    write_card(root, foundation.replace('"alpha"', '"noise"').replace("part", "order = 1\npart"), "noise")
    assert [card.slug for card in all_cards(root)] == ["noise", "zeta", "alpha"]


def test_the_closing_page_of_a_part_has_no_authors(root):
    ours = CARD.replace('authors = ["A. Author", "B. Author"]\n', "").replace("year = 2024\n", "")
    write_card(root, ours.replace('"alpha"', '"caching-compared"'), "caching-compared")
    card = load_card("caching-compared", root)
    assert card.authors == () and card.year is None and "paper</" not in tables.card_html(card)
    write_card(root, ours)
    with pytest.raises(CardError, match="closing page of a part .slug ending in '-compared'. go without"):
        load_card("alpha", root)


def test_profile(monkeypatch):
    monkeypatch.delenv("MINILIB_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_profile("smoke") == "smoke" and resolve_profile() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_profile() == "gpu"
    monkeypatch.setenv("MINILIB_PROFILE", "smoke")
    assert resolve_profile("auto") == "smoke"
    assert resolve_profile("cpu") == "cpu", "a name given on the page or by papermill wins"
    with pytest.raises(ValueError, match="profile is 'fast'; expected one of: auto, smoke, cpu, gpu"):
        resolve_profile("fast")
    monkeypatch.setenv("MINILIB_PROFILE", "fast")
    with pytest.raises(ValueError, match="variable MINILIB_PROFILE is 'fast'"):
        resolve_profile()


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == torch.device("cpu") == resolve_device("cpu")
    with pytest.raises(ValueError, match="device is 'tpu'; expected one of: auto, cpu, cuda, mps"):
        resolve_device("tpu")
    with pytest.raises(ValueError, match="device is 'cuda:1', which this machine does not have; it has: cpu"):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device() == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)


def test_device_of_a_run(root, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Reproduction("alpha", "cpu", SETTINGS, root=root).device == torch.device("cpu"), "cpu means cpu"
    assert Reproduction("alpha", "gpu", SETTINGS, root=root).device == torch.device("cuda")
    assert Reproduction("alpha", "smoke", SETTINGS, device="cuda", root=root).device == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Reproduction("alpha", "gpu", SETTINGS, root=root).device == torch.device("cpu")
    assert "no GPU was found" in capsys.readouterr().err
    with pytest.raises(ValueError, match="device is 'tpu'"):
        Reproduction("alpha", "cpu", SETTINGS, device="tpu", root=root)


@dataclass
class Thawed:
    seeds: int = 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"smoke": Settings((0,))}, "no entry for profile 'cpu'; it has: smoke"),
        ({"cpu": Settings((0,)), "tpu": Settings((0,))}, "unknown profile 'tpu'; known: smoke, cpu, gpu"),
        ({"cpu": Settings((0,)), "smoke": 3}, "instances of one dataclass"),
        ({"cpu": Thawed()}, r"@dataclass\(frozen=True\)"),
        ({"cpu": {"seeds": 1}}, "instances of one dataclass"),
    ],
)
def test_bad_settings(root, settings, message):
    with pytest.raises(ValueError, match=message):
        Reproduction("alpha", "cpu", settings, root=root)


def test_settings(root, run):
    assert run.settings is SETTINGS["cpu"] and run.profile == "cpu" and run.card.slug == "alpha"
    assert Reproduction("alpha", "gpu", Settings((1,)), root=root).settings == Settings((1,))
    assert Reproduction("alpha", "cpu", root=root).settings is None
    with pytest.raises(AttributeError):
        run.settings.lr = 1


def test_an_unknown_checkpoint_is_refused_before_the_work(root):
    write_card(root, CARD.replace("part =", 'zoo = ["no_such_checkpoint"]\npart ='))
    with pytest.raises(ValueError, match="'no_such_checkpoint', which zoo.toml does not list; listed:"):
        Reproduction("alpha", "cpu", SETTINGS, root=root)


@pytest.mark.parametrize(
    "values",
    [
        [1.5, 2, 2.5],
        (1.5, 2.0, 2.5),
        np.array([1.5, 2, 2.5]),
        torch.tensor([1.5, 2.0, 2.5]),
        [np.float32(1.5), 2, 2.5],
    ],
)
def test_values_come_in_many_forms(run, values):
    run.record("speed", values)
    assert run.as_record()["claims"]["speed"]["values"] == [1.5, 2.0, 2.5]


@pytest.mark.parametrize("value", [0.25, np.float64(0.25), torch.tensor(0.25), [0.25], 0.25 + 0])
def test_an_exact_claim_takes_one_value(run, value):
    run.record("sum", value)
    assert run.as_record()["claims"]["sum"]["values"] == [0.25]


@pytest.mark.parametrize(
    ("claim", "values", "message"),
    [
        ("sped", [1, 2, 3], r"no claim 'sped' on its card; known: sum, speed, seen, large"),
        ("speed", [1.0, 2.0], r"2 values, but the card asks for 3 seeds"),
        ("speed", [1.0, math.nan, 2.0], "expected finite numbers"),
        ("speed", [1.0, -math.inf, 2.0], "expected finite numbers"),
        ("speed", [], "expected finite numbers"),
        ("speed", ["a", "b", "c"], "expected one number a seed"),
        ("speed", np.ones((3, 2)), "expected one number a seed"),
        ("speed", None, "expected one number a seed"),
        ("large", [1.0], r"the card calls it untried \(it needs a large model\); change the card first"),
    ],
)
def test_what_record_refuses(run, claim, values, message):
    with pytest.raises(ValueError, match=message):
        run.record(claim, values)
    assert run.as_record()["claims"]["speed"]["values"] == [], "nothing is left behind"


def test_a_second_recording_is_refused(run):
    run.record("speed", [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="recorded already"):
        run.record("speed", [2.0, 3.0, 4.0])
    assert run.as_record()["claims"]["speed"]["values"] == [1.0, 2.0, 3.0]


def test_fewer_seeds_are_welcome_where_nothing_is_asserted(root):
    run = Reproduction("alpha", "smoke", SETTINGS, root=root)
    run.record("sum", 0.1)
    run.record("speed", [0.2])
    run.report()
    assert run.as_record()["claims"]["speed"]["verdict"] == "inconclusive"


def test_report_wants_every_asserted_claim(run, capsys):
    run.record("speed", [1.7, 1.8, 1.9])
    with pytest.raises(ClaimFailed, match="alpha: asserted in cpu but not recorded: sum$"):
        run.report()
    assert "It is faster" in capsys.readouterr().out, "the table is shown first"


def test_report_stops_at_an_exact_claim_that_fails(run, capsys):
    run.record("speed", [1.7, 1.8, 1.9])
    run.record("sum", 0.1 + 0.2)  # 0.30000000000000004
    with pytest.raises(ClaimFailed, match="exact claims that do not hold .*: sum$"):
        run.report()
    assert "contradicted" in capsys.readouterr().out


def test_a_claim_that_this_machine_cannot_try(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MINILIB_RECEIPTS", str(tmp_path))
    run.record("speed", [1.7, 1.8, 1.9])
    run.not_tried("sum", "no adder is installed (pip install adder)")
    run.report()
    out = capsys.readouterr().out
    assert "– not tried" in out
    assert "Not tried in this run: sum: no adder is installed (pip install adder)" in out
    entry = json.loads(json.dumps(run.as_record(), allow_nan=False))["claims"]["sum"]
    assert entry["verdict"] == "not tried" and entry["values"] == []
    assert entry["not_tried"] == "no adder is installed (pip install adder)"
    receipt = json.loads((tmp_path / "alpha.json").read_text())
    assert receipt["recorded"] == ["speed"] and receipt["not_tried"] == ["sum"]


def test_a_claim_is_tried_or_not_once(run):
    run.record("speed", [1.7, 1.8, 1.9])
    run.not_tried("sum", "no adder")
    for call, argument in ((run.record, 0.1), (run.not_tried, "still none")):
        with pytest.raises(ValueError, match=r"'sum'\): this run called it untried already \(no adder\)"):
            call("sum", argument)
    for claim, reason, message in (
        ("speed", "no clock", "recorded already"),
        ("large", "no GPU", "the card calls it untried"),
        ("sped", "no clock", "no claim 'sped' on its card"),
        ("seen", " ", "give the reason"),
    ):
        with pytest.raises(ValueError, match=message):
            run.not_tried(claim, reason)
    assert "not_tried" not in run.as_record()["claims"]["seen"]


def test_any_other_verdict_is_a_result(run, capsys):
    run.record("sum", 0.3)
    run.record("speed", [0.7, 0.8, 0.9])
    run.report()
    out = capsys.readouterr().out
    assert "✗ contradicted" in out and "✓ confirmed" in out and "– not tried" in out
    assert "it needs a large model" in out


def test_the_record(run, root):
    run.record("sum", 0.3)
    run.record("speed", [1.7, 1.8, 1.9])
    record = json.loads(json.dumps(run.as_record(), allow_nan=False))
    assert record["settings"] == json.loads(json.dumps(asdict(SETTINGS["cpu"])))
    assert record["claims"]["sum"] == {"values": [0.3], "mean": 0.3, "interval": None, "verdict": "confirmed"}
    speed = record["claims"]["speed"]
    assert (
        speed["verdict"] == "confirmed"
        and speed["values"] == [1.7, 1.8, 1.9]
        and abs(speed["mean"] - 1.8) < 1e-12
    )
    low, high = speed["interval"]
    assert 1.5 < low < 1.7 and 1.9 < high < 2.0
    assert record["claims"]["large"]["verdict"] == record["claims"]["seen"]["verdict"] == "not tried"
    assert record["slug"] == "alpha" and record["profile"] == "cpu" and record["device"] == "cpu"
    assert record["wall_s"] > 0 and record["peak_mb"] > 50 and record["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["numpy"] == np.__version__
    assert record["versions"]["python"] == sys.version.split()[0] and record["machine"]
    assert "minilib.reproduction" in record["modules"] and record["zoo"] == {}
    assert record["date"].endswith("+00:00")


class Shell:
    execution_count = 7


@pytest.fixture
def shown(monkeypatch):
    """What a notebook would be given to display."""
    import IPython
    import IPython.display

    bundles = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: Shell())
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


def test_the_report_in_a_notebook(run, shown):
    run.record("sum", 0.3)
    run.record("speed", [1.7, 1.8, 1.9])
    run.report()
    (bundle,) = shown
    assert set(bundle) == {"text/html", "text/plain", MIME}
    assert bundle[MIME]["claims"]["speed"]["values"] == [1.7, 1.8, 1.9]
    html = bundle["text/html"]
    assert 'class="minilib-table minilib-claims"' in html and "Alpha &amp; &lt;Omega&gt;" in html
    assert '<span class="minilib-verdict verdict-confirmed">✓ confirmed</span>' in html
    assert '<span class="minilib-verdict verdict-not-tried">– not tried</span>' in html
    for text in (
        "2.3x",
        "1.8 [1.631, 1.969], n = 3",
        "≥ 1.5 (no effect: 1)",
        "within [-1, 1]",
        "Profile cpu",
    ):
        assert text in html and text.split(" (")[0] in bundle["text/plain"], text


def test_card_and_settings_in_a_notebook(run, shown):
    run.show_card()
    run.show_settings()
    card, settings = (bundle["text/html"] for bundle in shown)
    for text in (
        "A. Author, B. Author (2024)",
        "https://arxiv.org/abs/2312.00858",
        "Digits stand in",
        "≥ 1.5",
        "One idea.",
    ):
        assert text in card
    assert "Not tried: it needs a large model" in card
    about, folded = card.split("<details")
    assert "One idea." in about and "≥ 1.5" not in about, "thirty claims would hide the idea: they are folded"
    count = len(run.card.claims)
    assert f"<summary>{count} claims with thresholds" in folded and folded.count("<code>") == count
    assert '<span class="chosen">0, 1, 2</span>' in settings and "<td>0</td>" in settings
    assert '<th scope="col"><span class="chosen">cpu</span></th>' in settings


def test_no_table_sets_a_text_colour():
    # Dark mode: text keeps the page's colour; verdicts are coloured by an edge, and told by a sign and a word.
    style = tables._STYLE.replace("border-left-color:", "")
    assert "color: inherit" in style and "color:" not in style.replace("color: inherit", "")
    assert set(tables.SIGNS) == set(reproduction.VERDICTS) and len(set(tables.SIGNS.values())) == len(
        tables.SIGNS
    )


def test_amendments_are_shown(root, capsys):
    write_card(root, CARD + AMENDED.format("speed"))
    run = Reproduction("alpha", "smoke", SETTINGS, root=root)
    run.record("sum", 0.3)
    run.report()
    assert "Amended 2024-05-01 (speed): 1.4 -> 1.5 Reason: A pilot was wrong." in capsys.readouterr().out


def test_a_receipt_is_left_where_one_is_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MINILIB_RECEIPTS", str(tmp_path / "receipts"))
    run.record("speed", [1.7, 1.8, 1.9])
    with pytest.raises(ClaimFailed):
        run.report()
    assert not (tmp_path / "receipts").exists(), "a failed run leaves none"
    run.record("sum", 0.3)
    run.report()
    receipt = json.loads((tmp_path / "receipts/alpha.json").read_text())
    assert receipt["slug"] == "alpha" and receipt["profile"] == "cpu" and receipt["wall_s"] > 0
    assert receipt["recorded"] == ["speed", "sum"]


def test_importing_it_is_light():
    # Heavy packages that a page may not need. torch is loaded by minilib itself, but not by this module.
    heavy = [
        "scipy.stats",
        "scipy.special",
        "matplotlib",
        "sklearn",
        "diffusers",
        "accelerate",
        "papermill",
        "IPython",
    ]
    code = f"import sys, minilib.reproduction; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
