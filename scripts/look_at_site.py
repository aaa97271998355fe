"""Takes pictures of the built site, and reports what a reader would stumble over.

    pip install playwright
    python scripts/look_at_site.py build/site build/pictures

Eight pages are photographed at the width of a phone and of a desk, light and dark. On
these, and with --all on every page, it reports errors on the console, requests that
fail or leave this machine, images that do not load, equations that do not render, and
pages that are wider than the window. It also searches for a word. It uses the Chromium
or Chrome that is installed, or the one that CHROMIUM names.
"""

import argparse
import functools
import http.server
import os
import pathlib
import shutil
import sys
import threading

from playwright.sync_api import Page, sync_playwright

PAGES = (
    "index.html",
    "start.html",
    "choose.html",
    "methods.html",
    "methods/asam.html",
    "evidence/which-method.html",
    "reference/sam_optax.html",
    "gallery.html",
)
SIZES = {"phone": (390, 1400), "desk": (1280, 1400)}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
    "--disable-sync",
)
LOOK = """async () => {
    if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
    for (const image of document.images) image.loading = "eager";
    await Promise.all([...document.images].map(i => i.decode().catch(() => 0)));
    const shown = i => i.getClientRects().length > 0;
    const broken = [...document.images].filter(i => shown(i) && !i.naturalWidth);
    const wide = document.documentElement.scrollWidth;
    const errors = [...document.querySelectorAll("mjx-merror, .MathJax_Error")];
    const raw = [...document.querySelectorAll(".math")].filter(
        m => !m.querySelector("mjx-container"));
    return [
        ...broken.map(i => "image does not load: " + i.src),
        ...(wide > window.innerWidth
            ? [`page is ${wide} wide in a window of ${window.innerWidth}`] : []),
        ...errors.map(e => "equation with an error: " + e.textContent),
        ...raw.map(e => "equation not rendered: " + e.textContent.slice(0, 60)),
    ];
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def serve(site: pathlib.Path) -> str:
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/"


def look(page: Page, address: str) -> list[str]:
    """Opens a page, and returns what is wrong with it."""
    wrong: list[str] = []

    def watch(request):
        if not request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            wrong.append(f"asks another host: {request.url}")

    def failed(request):
        if "ERR_ABORTED" not in request.failure:  # the page was left before it came
            wrong.append(f"request failed: {request.url}")

    handlers = {
        "console": lambda m: wrong.append(m.text) if m.type == "error" else None,
        "pageerror": lambda error: wrong.append(str(error)),
        "requestfailed": failed,
        "request": watch,
    }
    for event, handler in handlers.items():
        page.on(event, handler)
    page.goto(address, wait_until="load")
    wrong += page.evaluate(LOOK)
    for event, handler in handlers.items():
        page.remove_listener(event, handler)
    return wrong


def search(page: Page, root: str, word: str) -> list[str]:
    page.goto(f"{root}search.html?q={word}")
    page.wait_for_selector("p.search-summary:not(:empty)", timeout=20_000)
    page.wait_for_timeout(1000)  # the results come one after the other
    count = page.locator("ul.search > li").count()
    print(f"the search finds {word!r} on {count} pages or names")
    return [] if count else [f"the search does not find {word!r}"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("site", type=pathlib.Path)
    parser.add_argument("pictures", type=pathlib.Path)
    parser.add_argument("--all", action="store_true", help="look at every page")
    args = parser.parse_args(argv)
    args.pictures.mkdir(parents=True, exist_ok=True)
    found = os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, BROWSERS))
    )
    root, wrong, looked = serve(args.site), [], 0
    every = [p.relative_to(args.site).as_posix() for p in args.site.rglob("*.html")]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=list(OPTIONS))
        for size, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                page = browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme=scheme
                )
                for name in PAGES:
                    problems = look(page, root + name)
                    wrong += [f"{name}, {size}, {scheme}: {p}" for p in problems]
                    looked += 1
                    stem = name.removesuffix(".html").replace("/", "-")
                    page.screenshot(path=args.pictures / f"{stem}-{size}-{scheme}.png")
                page.close()
        page = browser.new_page(viewport={"width": 390, "height": 844})
        for name in sorted(set(every) - set(PAGES)) if args.all else ():
            wrong += [f"{name}, phone: {p}" for p in look(page, root + name)]
            looked += 1
        wrong += search(page, root, "bfloat16")
        browser.close()
    print(f"looked {looked} times at {len(every) if args.all else len(PAGES)} pages")
    print("\n".join(wrong) or "nothing is wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
