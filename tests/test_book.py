import doctest
import json
import re
import shutil
from pathlib import Path

import bookproject
import miniproject
import pytest
import yaml
from bookproject import REPO, build_book

# isort: split
import build
import check
import derive.markup
from derive.contents import bibliography, hand_written, toc
from derive.example import table as example_table
from derive.performance import table as performance_table
from derive.shelf import read_shelf
from derive.stage import fill, stage
from minilib.cards import all_cards


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A small project with one executed page and its book."""
    root = bookproject.build(tmp_path_factory.mktemp("book"))
    miniproject.publish(root, "dummy", "--profile", "cpu")
    return root


@pytest.fixture
def copy(project, tmp_path):
    """The same, to be spoilt."""
    root = tmp_path / "copy"
    miniproject.run(project, "cp", "-r", str(project), str(root))
    return root


@pytest.fixture(scope="module")
def site(project):
    """The site of this repository; while it has no executed page, the small project's."""
    if bookproject.pages():
        return bookproject.site()
    done = build_book(project)
    assert done.returncode == 0, done.stderr
    return project / "build" / "site" / "html"


def test_site_is_sound(site):
    assert check.check(site) == []
    assert len(list(site.glob("notebooks/*/*.html"))) == len(bookproject.pages() or ["dummy"])


def test_second_build_does_nothing(site):
    stamp = (site / "index.html").stat().st_mtime_ns
    done = build_book(site.parents[2])
    assert done.stdout.startswith("up to date"), done.stdout + done.stderr
    assert (site / "index.html").stat().st_mtime_ns == stamp


def test_sources_are_left_alone(site):
    left = [
        path
        for path in (site.parents[2] / "book").rglob("*")
        if path.name in ("_build", "_toc.yml", "jupyter_execute")
    ]
    assert left == []


def test_every_claim_is_on_the_results_page(site):
    results = (site / "results.html").read_text()
    cards = all_cards(site.parents[2])
    for card in cards:
        assert f'id="{card.slug}"' in results
        for claim in card.claims:
            assert derive.markup.text(claim.statement) in results
            if claim.not_tried:
                assert derive.markup.text(claim.not_tried) in results
    assert results.count("<tr") - 1 >= sum(len(card.claims) for card in cards)


def test_every_page_says_where_it_comes_from(site):
    root = site.parents[2]
    shelf = read_shelf(root)
    for page in shelf.readable():
        html = (site / f"{page.docname}.html").read_text()
        assert f'href="{shelf.colab(page)}"' in html
        assert shelf.colab(page).endswith(f"/blob/main/{page.card.notebook}")
        assert f"results.html#{page.card.slug}" in html
        assert (root / page.card.notebook).is_file()
        listed = (site / "parts" / f"{page.card.part}.html").read_text()
        assert (
            f"../{page.docname}.html" in listed
            and page.docname in (site / "index.html").read_text() + (site / "intro.html").read_text()
        )


def test_contents_follow_the_cards(project):
    shelf = read_shelf(project)
    parts = {group["caption"]: group for group in yaml.safe_load(toc(shelf))["parts"]}
    assert parts["Pages"]["chapters"] == [
        {"file": "parts/06-experts", "sections": [{"file": "notebooks/06-experts/dummy"}]}
    ]
    listed = {c["file"] for name, group in parts.items() if name != "Pages" for c in group["chapters"]}
    assert listed | {"intro"} == hand_written()


def test_pages_stand_in_the_order_of_parts_and_cards(copy):
    (notebook,) = copy.glob("notebooks/*/dummy.ipynb")
    for slug, part, order in (
        ("zulu", "00-foundations", 1),
        ("alpha", "00-foundations", 2),
        ("first", "06-experts", 0),
    ):
        miniproject.write(
            copy / f"reproductions/{slug}/paper.toml",
            miniproject.CARD.format(slug=slug, part=part, order=order, zoo="[]"),
        )
        miniproject.write(copy / f"notebooks/{part}/{slug}.ipynb", notebook.read_text())
    miniproject.write(  # a card without a run is no page
        copy / "reproductions/later/paper.toml",
        miniproject.CARD.format(slug="later", part="06-experts", order=5, zoo="[]"),
    )
    chapters = next(
        group for group in yaml.safe_load(toc(read_shelf(copy)))["parts"] if group["caption"] == "Pages"
    )["chapters"]
    assert [c["file"] for c in chapters] == ["parts/00-foundations", "parts/06-experts"]
    assert [s["file"].rpartition("/")[2] for c in chapters for s in c["sections"]] == [
        "zulu",
        "alpha",
        "first",
        "dummy",
    ]


def test_a_part_needs_an_introduction(copy):
    (copy / "book/parts/06-experts.md").unlink()
    with pytest.raises(ValueError, match=r"book/parts/06-experts\.md is missing"):
        read_shelf(copy)


def test_a_repository_address_is_needed(copy):
    (copy / "pyproject.toml").write_text("[project]\n")
    with pytest.raises(ValueError, match=r"\[project\.urls\] has no Repository"):
        read_shelf(copy)


def test_works_are_listed_once(copy):
    further = copy / "book/references.bib"
    text = further.read_text()
    keys = re.findall(r"^@\w+\{(.+),", bibliography(read_shelf(copy)), flags=re.MULTILINE)
    assert keys[0] == "dummy" and len(keys) == len(set(keys)) > 10
    further.write_text(text + "@misc{dummy, title={x}}\n")
    with pytest.raises(ValueError, match="'dummy' is the key of reproductions/dummy/paper.toml"):
        bibliography(read_shelf(copy))
    further.write_text(text + "@misc{ho2020denoising, title={x}}\n")
    with pytest.raises(ValueError, match="'ho2020denoising' is there twice"):
        bibliography(read_shelf(copy))
    further.write_text(
        text
        + "@misc{other, title={x}, eprint = {2407.11633}}\n@misc{more, title={x},\n eprint = {2407.11633}}"
    )
    miniproject.replace(
        copy / "reproductions/dummy/paper.toml", "year = 2024", 'year = 2024\narxiv = "2407.11633"'
    )
    with pytest.raises(ValueError, match=r"arXiv 2407\.11633 has a card; remove the entry and cite 'dummy'"):
        bibliography(read_shelf(copy))


def test_titles_survive_bibtex(copy):
    miniproject.replace(copy / "reproductions/dummy/paper.toml", "The dummy paper", "R&D at 50% of DiT_XL")
    assert r"title = {{R\&D at 50\% of DiT\_XL}}" in bibliography(read_shelf(copy))


def test_every_hand_written_page_is_in_the_contents(copy):
    (copy / "book/stray.md").write_text("# Stray\n")
    with pytest.raises(ValueError, match=r"book/stray\.md: add it to derive/contents\.py"):
        stage(read_shelf(copy))
    (copy / "book/stray.md").unlink()
    (copy / "book/conventions.md").unlink()
    with pytest.raises(ValueError, match=r"book/conventions\.md: .*missing"):
        stage(read_shelf(copy))


def test_unknown_derived_block_is_refused():
    with pytest.raises(ValueError, match=r"book/x\.md: unknown derived block 'typo'; known: results"):
        fill("<!-- derived: typo -->", {"results": ""}, "book/x.md")


def test_a_page_begins_with_its_title(copy):
    (path,) = copy.glob("notebooks/*/dummy.ipynb")
    notebook = json.loads(path.read_text())
    path.write_text(json.dumps(notebook | {"cells": notebook["cells"][1:]}))
    with pytest.raises(ValueError, match="the first cell must be Markdown and begin with the page's title"):
        stage(read_shelf(copy))


def test_record_data_stays_out_of_the_site_but_tables_remain(project):
    staged = stage(read_shelf(project))["notebooks/06-experts/dummy.ipynb"].decode()
    assert "vnd.minilib.record" not in staged
    assert "minilib-claims" in staged
    assert "vnd.minilib.record" in next(project.glob("notebooks/*/dummy.ipynb")).read_text()


def test_page_and_dashboard_say_that_the_library_has_changed(copy):
    def says() -> tuple[bool, bool]:
        files = stage(read_shelf(copy))
        page, results = files["notebooks/06-experts/dummy.ipynb"].decode(), files["results.md"].decode()
        return "The library has changed since this run" in page, "library has changed since" in results

    # The key is of the small project's library, so for this process's minilib it has changed.
    assert says() == (True, True)
    record = json.loads((copy / "reproductions/dummy/cpu.json").read_text())
    from minilib.keys import library_key

    bookproject.edit_json(
        copy / "reproductions/dummy/cpu.json", library_key=library_key(record["modules"], record["zoo"])
    )
    assert says() == (False, False)


def test_fresh_runs_are_shown_in_place_of_committed_ones(copy):
    fresh = copy / "results/cpu"
    fresh.mkdir(parents=True, exist_ok=True)
    for name in ("ipynb", "json"):
        (fresh / f"dummy.{name}").unlink(missing_ok=True)
    (notebook,) = copy.glob("notebooks/*/dummy.ipynb")
    (fresh / "dummy.ipynb").write_text(notebook.read_text())
    (fresh / "dummy.json").write_text((copy / "reproductions/dummy/cpu.json").read_text())
    bookproject.edit_json(fresh / "dummy.json", date="2031-05-06T00:00:00+00:00")
    assert b"2031-05-06" in stage(read_shelf(copy, fresh))["results.md"]
    assert b"2031-05-06" not in stage(read_shelf(copy))["results.md"]


def test_dashboard_line_by_line(copy):
    record = json.loads((copy / "reproductions/dummy/cpu.json").read_text())
    (copy / "reproductions/dummy/gpu.json").write_text(
        json.dumps(record | {"profile": "gpu", "date": "2030-01-01"})
    )
    card = copy / "reproductions/dummy/paper.toml"
    card.write_text(
        card.read_text()
        + '\n[[claims]]\nid = "fid"\nstatement = "FID < 2 & falling"\npaper = "1.7"\nkind = "quality"\n'
        + 'not_tried = "No <ImageNet>"\n'
        + '\n[[amendments]]\ndate = 2026-01-02\nclaim = "gain"\nchange = "1.8 to 1.5"\nreason = "by counting"\n'
    )
    results = stage(read_shelf(copy))["results.md"].decode()
    rows = re.findall(r"<tr.*?</tr>", results)[1:]
    assert len(rows) == 5  # two claims with a cpu and a gpu record, one untried
    assert results.count(' id="dummy"') == 1
    gain = [row for row in rows if "more than a half" in row]
    assert all(
        "1.76" in row and "≥ 1.5" in row and "no effect: 1" in row and "confirmed" in row for row in gain
    )
    assert "amended 2026-01-02: 1.8 to 1.5 (by counting)" in gain[0] and "<svg" in gain[0]
    (untried,) = [row for row in rows if "not-tried" in row]
    assert "FID &lt; 2 &amp; falling" in untried and "No &lt;ImageNet&gt;" in untried and "1.7" in untried


def test_dashboard_of_a_card_without_a_run(copy):
    (copy / "reproductions/dummy/cpu.json").unlink()
    next(copy.glob("notebooks/*/dummy.ipynb")).unlink()
    results = stage(read_shelf(copy))["results.md"].decode()
    assert results.count("not-run-yet") >= 2 and "notebooks/" not in results


def test_performance_page(tmp_path):
    assert "no benchmark record yet" in performance_table(tmp_path)
    # As minilib.bench writes them.
    times = {"ours_ms": 1.2, "peer_ms": 2.0, "noise": 1.014, "peer": "DiTTransformer2DModel"}
    context = {
        "machine": "A CPU",
        "threads": 1,
        "date": "2026-01-01",
        "torch": "2.13.0",
        "diffusers": "0.42.1",
    }
    rows = [
        {"name": "forward, batch 1", "goal": 0.75, "ratio": 0.6} | times | context,
        {"name": "step overhead", "goal": 0.25, "ratio": 0.3} | times | context,
    ]
    miniproject.write(tmp_path / "tests/benchmarks/record.json", json.dumps(rows))
    table = performance_table(tmp_path)
    assert table.count("A CPU, 1 thread, torch 2.13.0, diffusers 0.42.1") == 1
    assert "0.60" in table and "≤ 0.75" in table and "against itself: 1.01" in table
    assert table.count("✓ yes") == table.count("✗ no") == 1


def test_performance_page_shows_exponents_and_what_was_not_measured(tmp_path):
    context = {
        "machine": "A CPU",
        "threads": 1,
        "date": "2026-01-01",
        "torch": "2.13.0",
        "diffusers": "0.42.1",
    }
    growth = {"peer": "itself", "sizes": [1024, 4096], "ms": [2.0, 8.5], "interval": [0.9, 1.2]} | context
    rows = [
        {"name": "linear: tokens", "goal": [0.8, 1.15], "exponent": 1.04} | growth,
        {"name": "scan: length", "goal": [0.8, 1.15], "exponent": 1.3} | growth,
        {"name": "scan", "peer": "mambapy", "goal": 0.8, "not_measured": "mambapy is not installed"}
        | context,
    ]
    miniproject.write(tmp_path / "tests/benchmarks/record.json", json.dumps(rows))
    table = performance_table(tmp_path)
    assert "N<sup>1.04</sup>" in table and "fit: 0.90 to 1.20" in table and "0.8 to 1.15" in table
    assert "2, 8.5 ms" in table and "at N = 1024, 4096" in table
    assert table.count("✓ yes") == table.count("✗ no") == 1
    assert "mambapy is not installed" in table and table.count("not measured") == 1


def test_worked_example_has_one_outcome_of_each_kind():
    table = example_table()
    found = re.findall(r'class="verdict verdict-([\w-]+)"', table)
    assert found == ["confirmed", "weaker", "inconclusive", "contradicted"]
    assert "[1.787, 2.213]" in table and "[0.7767, 1.423]" in table  # worked out by hand from t = 2.132


def test_strict_build_names_the_fault_and_keeps_the_old_site(copy):
    old = copy / "build/site/html/index.html"
    shutil.rmtree(copy / "build", ignore_errors=True)
    miniproject.write(old, "old")
    (path,) = copy.glob("notebooks/*/dummy.ipynb")
    good = path.read_text()
    path.write_text(good.replace("{ref}`sec-dummy-idea`", "{ref}`nowhere`"))
    done = build_book(copy)
    assert done.returncode == 1 and "undefined label: 'nowhere'" in done.stderr
    path.write_text(good.replace('"alt": "A line that rises from 0 to 1."', '"width": "50%"'))
    done = build_book(copy, "--page", "dummy")
    assert done.returncode == 1 and "has no alt text" in done.stderr
    assert old.read_text() == "old" and not (copy / "build/site/.key").exists()


def test_staged_folder_holds_nothing_else(tmp_path):
    # Sphinx keeps quiet about a page that it has in its cache, so no cache may survive.
    miniproject.write(tmp_path / "book/_build/.doctrees/environment.pickle", "stale")
    build.write_files(tmp_path / "book", {"a/b.md": b"x"})
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == ["book/a/b.md"]


GOOD = '<html><body><h1 id="a">x</h1><a href="#a">x</a><a href="b.html#c">x</a><img src="i.png" alt="A picture."></body></html>'


def write_site(root: Path, **files: str) -> Path:
    contents = {"index.html": GOOD, "b.html": '<p id="c"></p>', "i.png": ""} | {
        k.replace("__", "."): v for k, v in files.items()
    }
    for name, text in contents.items():
        miniproject.write(root / name, text)
    return root


def test_a_sound_site_passes(tmp_path):
    assert check.check(write_site(tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("x__html", '<a href="gone.html">x</a>', "link to gone.html, which does not exist"),
        ("x__html", '<a href="b.html#d">x</a>', "no anchor 'd'"),
        ("x__html", '<a href="#d">x</a>', "no anchor 'd'"),
        ("x__html", '<img src="gone.png" alt="A picture.">', "asset gone.png is missing"),
        ("x__html", '<img src="i.png">', "has no alt text"),
        ("x__html", '<img src="i.png" alt="i.png">', "has no alt text"),
        ("x__html", '<img src="i.png" alt="../_images/0123.png">', "has no alt text"),
        ("x__html", '<script src="https://cdn.example.org/a.js"></script>', "from another host"),
        ("x__html", '<script src="//example.org/a.js"></script>', "from another host"),
        ("x__html", '<link rel="stylesheet" href="https://example.org/a.css">', "from another host"),
        ("x__html", '<link rel="preconnect" href="https://example.org">', "from another host"),
        ("x__html", '<iframe src="https://example.org"></iframe>', "from another host"),
        ("x__html", "<style>@import 'https://example.org/a.css';</style>", "from another host"),
        ("x__html", '<p style="background: url(https://example.org/a.png)">x</p>', "from another host"),
        (
            "x__html",
            '<script>load("https://unpkg.com/thebe@0.8.2/lib/index.js")</script>',
            "its script names https://unpkg.com",
        ),
        ("x__css", "p {background: url('https://example.org/a.png')}", "from another host"),
        ("x__js", 'import("https://cdn.jsdelivr.net/npm/x")', "its script names https://cdn.jsdelivr.net"),
    ],
)
def test_faults_of_a_site_are_named(tmp_path, name, text, fault):
    faults = check.check(write_site(tmp_path, **{name: text}))
    assert len(faults) == 1 and fault in faults[0] and faults[0].startswith(name.replace("__", "."))


def test_ordinary_links_to_other_hosts_are_fine(tmp_path):
    text = '<a href="https://arxiv.org/abs/2006.11239">x</a><a href="mailto:a@b.org">x</a><link rel="canonical" href="https://e.org">'
    assert check.check(write_site(tmp_path, x__html=text)) == []


def test_an_empty_site_is_a_fault(tmp_path):
    assert "build the book first" in check.check(tmp_path)[0]


def test_doctests():
    assert doctest.testmod(derive.markup).failed == 0


def test_licence_files_are_whole():
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in (REPO / "LICENSE").read_text()
    assert "Section 8 -- Interpretation." in (REPO / "LICENSE-TEXT").read_text()
