"""Checks a built site: every internal link, anchor, image and script leads somewhere.

    python scripts/check_links.py build/site

It also fails if a page loads a script, a style or an image from another host: the site
must be readable without a network.
"""

import pathlib
import sys
import urllib.parse
from html.parser import HTMLParser

LOADS = {"script": "src", "img": "src", "link": "href", "source": "src"}


class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in LOADS and found.get("rel") not in ("canonical", "edit", "index"):
            self.loads.append(found.get(LOADS[tag], ""))


def check(site: pathlib.Path) -> list[str]:
    """Returns what is wrong, and prints how much was looked at."""
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    wrong, links, anchors, outside = [], 0, 0, set()
    for path, page in pages.items():
        name = path.relative_to(site)
        for address in page.loads:
            if urllib.parse.urlsplit(address).netloc:
                wrong.append(f"{name} loads {address}")
        for address in [*page.links, *page.loads]:
            parts = urllib.parse.urlsplit(address)
            if parts.scheme or parts.netloc:
                outside.add(address)
                continue
            links += 1
            target = path
            if parts.path:
                target = (path.parent / urllib.parse.unquote(parts.path)).resolve()
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                wrong.append(f"{name} leads to {address}, which is not there")
            elif parts.fragment and target in pages:
                anchors += 1
                anchor = urllib.parse.unquote(parts.fragment)
                if anchor not in pages[target].anchors:
                    wrong.append(f"{name} leads to {address}: no such anchor")
    print(
        f"{len(pages)} pages, {links} internal links, {anchors} with an anchor, "
        f"{len(outside)} addresses outside of the site (not tried)"
    )
    return wrong


if __name__ == "__main__":
    site = pathlib.Path(sys.argv[1]).resolve()
    if not (site / "index.html").exists():
        sys.exit(f"There is no site in {site}.")
    if problems := check(site):
        sys.exit("\n".join(problems))
