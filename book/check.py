"""Check a built site: every internal link leads somewhere, every image has alt text, nothing is loaded from elsewhere.

python book/check.py build/site/html
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes that make a browser load something at once; an ordinary link is not among them.
ASSETS = {
    "script": ("src",), "link": ("href",), "img": ("src", "srcset"), "source": ("src", "srcset"), "iframe": ("src",),
    "video": ("src", "poster"), "audio": ("src",), "object": ("data",), "embed": ("src",), "use": ("href", "xlink:href"),
}  # fmt: skip
LOADING_RELS = {
    "stylesheet",
    "icon",
    "preload",
    "modulepreload",
    "prefetch",
    "preconnect",
    "dns-prefetch",
    "manifest",
}
_CSS_URL = re.compile(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)")
_CDN = re.compile(r"https?://(?:cdn\.|cdnjs\.|unpkg\.|fonts\.g|ajax\.g|[\w.-]*\.cloudfront\.)[\w./@-]*")
# The speech engine's addresses inside MathJax: reached only from its menu, which _config.yml turns off.
CDN_ALLOWED = {"mathjax/tex-chtml-full.js"}


@dataclass
class Document(HTMLParser):
    """Links, anchors, assets and images of one HTML file."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    assets: list[str] = field(default_factory=list)
    images_without_alt: list[str] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Set up the parser behind the fields."""
        super().__init__()
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what one tag links to, loads or names."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        self._in_style = tag == "style"
        if "style" in given:
            self.styles.append(given["style"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and not LOADING_RELS & set(given.get("rel", "").lower().split()):
            return
        for name in ASSETS.get(tag, ()):
            if given.get(name):
                self.assets.append(given[name].split()[0])
        decorative = given.get("role") == "presentation" or given.get("aria-hidden") == "true"
        # Sphinx puts the file's name where an image has no alt text; that tells a reader nothing.
        alt = given.get("alt", "").strip()
        if tag == "img" and not decorative and (not alt or alt == given.get("src") or "_images/" in alt):
            self.images_without_alt.append(given.get("src", "")[:80])

    def handle_data(self, data: str) -> None:
        """Keep style sheets written into the page."""
        if self._in_style:
            self.styles.append(data)
            self._in_style = False


def read(path: Path) -> Document:
    """Parse one HTML file."""
    document = Document()
    document.feed(path.read_text(encoding="utf-8"))
    return document


def is_external(address: str) -> bool:
    """Whether a browser would go to another host for this address."""
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ftp")


def check(site: Path) -> list[str]:
    """Every fault of a built site, one line each; empty when it is sound."""
    pages = {
        path: read(path)
        for path in sorted(site.rglob("*.html"))
        if "_static" not in path.relative_to(site).parts
    }
    if not pages:
        return [f"{site}: there is no HTML page; build the book first: make book"]
    faults = [
        fault for path, document in pages.items() for fault in _page_faults(site, path, document, pages)
    ]
    return faults + list(_style_faults(site)) + list(_script_faults(site))


def _page_faults(site: Path, path: Path, document: Document, pages: dict[Path, Document]) -> Iterator[str]:
    where = path.relative_to(site)
    for source in document.images_without_alt:
        yield f'{where}: image {source} has no alt text; give its cell mystnb={{"image": {{"alt": "..."}}}}'
    for address in [*document.assets, *(m[1] or m[2] for s in document.styles for m in _CSS_URL.finditer(s))]:
        if is_external(address):
            yield f"{where}: loads {address} from another host; put it into book/_static"
        elif not urlsplit(address).scheme and not _target(path, address).is_file():
            yield f"{where}: asset {address} is missing"
    for address in document.links:
        fault = _link_fault(site, path, address, pages)
        if fault:
            yield f"{where}: {fault}"


def _target(path: Path, address: str) -> Path:
    return (path.parent / unquote(urlsplit(address).path)).resolve()


def _link_fault(site: Path, path: Path, address: str, pages: dict[Path, Document]) -> str | None:
    parts = urlsplit(address)
    if is_external(address) or parts.scheme:
        return None
    target = _target(path, address) if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return f"link to {address}, which does not exist"
    document = pages.get(target)
    # "#" and "#top" go to the head of a page without any anchor.
    if (
        document is not None
        and parts.fragment not in ("", "top")
        and unquote(parts.fragment) not in document.anchors
    ):
        return f"link to {address}: that page has no anchor {parts.fragment!r}"
    return None


def _style_faults(site: Path) -> Iterator[str]:
    for path in sorted(site.rglob("*.css")):
        for match in _CSS_URL.finditer(path.read_text(encoding="utf-8", errors="replace")):
            address = match[1] or match[2]
            if is_external(address):
                yield f"{path.relative_to(site)}: loads {address} from another host"


def _script_faults(site: Path) -> Iterator[str]:
    for path in [*sorted(site.rglob("*.js")), *sorted(site.rglob("*.html"))]:
        if any(str(path).endswith(name) for name in CDN_ALLOWED):
            continue
        scripts = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".html":
            scripts = "\n".join(re.findall(r"<script[^>]*>(.*?)</script>", scripts, flags=re.DOTALL))
        for address in sorted(set(_CDN.findall(scripts))):
            yield f"{path.relative_to(site)}: its script names {address}"


def main() -> int:
    """Print every fault of the site; the exit code says whether there was one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, nargs="?", default=Path("build/site/html"))
    faults = check(parser.parse_args().site.resolve())
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
