"""The built site in a real browser, at the width of a desk and of a phone, cut off from the network."""

import functools
import http.server
import re
import shutil
import threading
from pathlib import Path

import bookproject
import miniproject
import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason=f"no browser: none of {', '.join(NAMES)} is installed (Debian: apt-get install chromium)",
)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the site: this repository's, or while it has no executed page, a small project's."""
    if bookproject.pages():
        return bookproject.site()
    root = bookproject.build(tmp_path_factory.mktemp("browser"))
    miniproject.publish(root, "dummy", "--profile", "cpu")
    done = bookproject.build_book(root)
    assert done.returncode == 0, done.stderr
    return root / "build/site/html"


@pytest.fixture(scope="module")
def address(site):
    """The site served on this machine."""
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (book extra)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(params=list(WIDTHS))
def page(request, browser, address):
    """A browser page; whatever it asks of another host is refused and, at the end, a failure."""
    width, height = WIDTHS[request.param]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        base_url=address,
        color_scheme="light",
        has_touch=request.param == "phone",
    )
    foreign: list[str] = []
    broken: list[str] = []

    def decide(route):
        if route.request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            foreign.append(route.request.url)
            route.abort()

    context.route("**/*", decide)
    context.on("response", lambda response: broken.append(response.url) if response.status >= 400 else None)
    context.on("weberror", lambda error: broken.append(str(error.error)))
    context.set_default_timeout(120_000)  # a busy machine is slow, not wrong
    page = context.new_page()
    page.phone = request.param == "phone"
    yield page
    context.close()
    assert foreign == []
    assert broken == []


def overflow(page) -> int:
    """Pixels by which the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def with_figure(site: Path) -> str:
    """Address of a page that has a figure."""
    for path in sorted(site.glob("notebooks/*/*.html")):
        if re.search(r"<figure[^>]*>\s*(<a[^>]*>)?<img", path.read_text()):
            return str(path.relative_to(site))
    raise AssertionError("no page has a figure with a caption")


def every_page(site: Path) -> list[str]:
    """Addresses of all pages but index.html, which only leads on to intro.html."""
    paths = (path.relative_to(site) for path in site.rglob("*.html"))
    return sorted(str(path) for path in paths if path.parts[0] not in ("_static", "index.html"))


def test_every_page_fits_its_window(page, site):
    too_wide = {}
    for path in every_page(site):
        page.goto(f"/{path}", wait_until="load")
        page.evaluate("window.MathJax?.startup?.promise")  # equations take their width late
        if overflow(page) > 0:
            too_wide[path] = overflow(page)
    assert too_wide == {}


def test_the_landing_page_leads_to_the_pages(page):
    page.goto("/")
    page.wait_for_url("**/intro.html")
    cards = page.locator("a.page-card")
    cards.first.wait_for()
    assert cards.count() > 0
    title = cards.first.locator(".page-card-title").inner_text()
    cards.first.click()
    assert page.locator("h1").first.inner_text().replace("#", "").strip().endswith(title)
    assert page.locator("a.colab-badge").is_visible()


def test_figures_equations_and_tables_are_there(page, site):
    page.goto(f"/{with_figure(site)}")
    figure = page.locator("figure img").first
    figure.scroll_into_view_if_needed()
    assert figure.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    assert len(figure.get_attribute("alt")) > 10
    assert figure.bounding_box()["width"] <= page.viewport_size["width"]
    page.wait_for_selector("mjx-container")
    assert page.locator(".minilib-claims").count() == 1


def test_solutions_unfold(page, site):
    page.goto(f"/{with_figure(site)}")
    solution = page.locator("details", has_text="Solution 1").first
    assert not solution.evaluate("element => element.open")
    solution.locator("summary").click()
    assert solution.evaluate("element => element.open")


def test_search_finds_a_word(page):
    page.goto("/intro.html")
    page.locator(
        "button.search-button:visible, button.search-button-field:visible, .search-button__button:visible"
    ).first.click()
    box = page.locator("input[type=search]:visible").first
    box.fill("diffusion")
    box.press("Enter")
    page.wait_for_url("**/search.html?q=diffusion*")
    page.wait_for_selector("ul.search li a")
    assert page.locator("ul.search li").count() >= 1


def test_dark_theme(page, site):
    page.goto(f"/{with_figure(site)}")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    button = page.locator(".theme-switch-button:visible").first
    for _ in range(3):  # it goes round light, dark and automatic
        if page.locator("html").get_attribute("data-theme") == "dark":
            break
        button.click()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    assert page.evaluate(background) != light
    # Axes and labels are dark, so figures keep a white sheet.
    sheet = page.locator("figure img").first.evaluate("image => getComputedStyle(image).backgroundColor")
    assert sheet == "rgb(255, 255, 255)"
    # Our tables have no sheet of their own: text must not vanish on it.
    table = page.locator(".minilib-claims").first.evaluate(
        "e => getComputedStyle(e.parentElement).backgroundColor"
    )
    assert table == "rgba(0, 0, 0, 0)"


def test_dashboard_filters_and_sorts(page):
    page.goto("/results.html")
    rows = page.locator("table.results tbody tr:visible")
    everything = rows.count()
    assert everything > 0
    button = page.locator("[data-filter-verdict=confirmed]")
    expected = int(re.search(r"\d+", button.inner_text())[0])
    button.click()
    assert rows.count() == expected
    assert set(rows.locator("td:nth-child(5)").all_inner_texts()) == {"✓ confirmed"}
    button.click()
    assert rows.count() == everything
    page.locator("[data-filter-text]").fill("no such claim anywhere")
    assert rows.count() == 0
    page.locator("[data-filter-text]").fill("")
    if page.phone:
        assert not page.locator("table.results thead button").first.is_visible() or overflow(page) == 0
        return
    head = page.locator("table.results th", has_text="Here")
    head.locator("button").click()
    keys = [float(key) for key in rows.evaluate_all("rows => rows.map(r => r.cells[2].dataset.sort)") if key]
    assert head.get_attribute("aria-sort") == "ascending" and keys == sorted(keys)
    head.locator("button").click()
    keys = [float(key) for key in rows.evaluate_all("rows => rows.map(r => r.cells[2].dataset.sort)") if key]
    assert keys == sorted(keys, reverse=True)


def test_the_contents_list_opens(page):
    page.goto("/add-a-paper.html")
    link = page.locator(
        "nav.bd-links a, .bd-links__title ~ * a, .sidebar-primary-item a", has_text="Results"
    ).first
    if page.phone:
        assert not link.is_visible()
        page.locator(".primary-toggle:visible").first.click()
    page.locator("a:visible", has_text="Results").first.click()
    page.wait_for_url("**/results.html")
