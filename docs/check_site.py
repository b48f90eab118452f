"""Open every page of site/ in a browser without a network, and look at it.

    python docs/check_site.py [--shots FOLDER] [--pages index.html …] [--query WORDS]

Fails on a request that fails or leaves the machine, an error on the console, a formula
that was not set, a page wider than the screen, or 88 columns of code that do not fit
at 1280 px. Types a query into the search box. Writes screenshots, phone and desktop,
light and dark. Needs Chromium; says so and ends if there is none. Nothing else.
"""

import argparse
import base64
import functools
import http.server
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from book import ROOT

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "chrome"]
FLAGS = [
    "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run",
    "--disable-background-networking --disable-component-update --disable-sync",
    "--disable-default-apps --disable-extensions --disable-dev-shm-usage",
    "--remote-debugging-pipe",
]
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
TILE, TILES = 1800, 6  # height of a screenshot; a long page becomes several

# What is wrong with the page as it stands, as a list of sentences.
LOOK = """(() => {
  const folded = document.querySelectorAll("details:not([open])");
  folded.forEach((part) => part.open = true);
  const wrong = [], wide = document.documentElement.scrollWidth;
  const screen = document.documentElement.clientWidth;
  if (wide > screen) wrong.push(`page is ${wide} px wide on ${screen}`);
  if (screen > 1200) for (const code of document.querySelectorAll("pre > code"))
    if (code.clientWidth && code.scrollWidth > code.clientWidth + 1 &&
        code.textContent.split("\\n").every((line) => line.length <= 88))
      wrong.push(`code scrolls: ${code.textContent.trim().slice(0, 50)}`);
  for (const math of document.querySelectorAll(".arithmatex"))
    if (!math.querySelector(".katex")) wrong.push(`no formula: ${math.textContent}`);
  for (const image of document.images)
    if (!image.naturalWidth) wrong.push(`no image: ${image.src}`);
  folded.forEach((part) => part.open = false);
  return wrong;
})()"""
FOUND = """(async () => {
  for (let i = 0; i < 50; i++) {
    await new Promise((done) => setTimeout(done, 100));
    const found = document.querySelectorAll(".md-search-result__link");
    if (found.length) return found.length;
  }
  return 0;
})()"""


class Browser:
    """Chromium, spoken to over a pipe: JSON messages with a zero byte at the end."""

    def __init__(self, program: str) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        flags = [
            *" ".join(FLAGS).split(),
            OFFLINE,
            f"--user-data-dir={self.folder.name}",
        ]
        # the browser reads its file 3 and writes its file 4
        script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["sh", "-c", script, program, *flags, "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in), os.close(theirs_out)
        self.out, self.input = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb")
        self.buffer, self.events, self.ids = b"", [], itertools.count(1)
        self.session = None
        page = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attached["sessionId"]
        for domain in ["Page", "Runtime", "Network", "Log"]:
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """Send a command, wait for its answer; events on the way are kept."""
        message = {"id": next(self.ids), "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        self.out.flush()
        while (answer := self.read()).get("id") != message["id"]:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def read(self) -> dict:
        while b"\0" not in self.buffer:
            data = os.read(self.input.fileno(), 1 << 20)
            if not data:
                raise RuntimeError("the browser ended.")
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def evaluate(self, script: str):
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        phone = {"deviceScaleFactor": 2 if width < 600 else 1, "mobile": width < 600}
        how = {"width": width, "height": height} | phone
        self.call("Emulation.setDeviceMetricsOverride", **how)

    def open(self, url: str, size: tuple[int, int], scheme: str) -> None:
        """Go to a page, and wait until it and its fonts are there."""
        self.resize(*size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.read())
        self.evaluate("document.fonts.ready.then(() => 1)")
        self.evaluate("new Promise((done) => setTimeout(done, 150))")

    def complaints(self) -> list[str]:
        """What went wrong since the page was opened."""
        wrong, urls = [], {}
        for event in self.events:
            method, params = event.get("method", ""), event.get("params", {})
            if method == "Network.requestWillBeSent":
                urls[params["requestId"]] = url = params["request"]["url"]
                if not url.startswith(("http://127.0.0.1", "data:", "blob:")):
                    wrong.append(f"asks the network: {url}")
            elif method == "Network.loadingFailed" and not params.get("canceled"):
                url = urls.get(params["requestId"], "?")
                wrong.append(f"request failed: {url} {params['errorText']}")
            elif method == "Network.responseReceived":
                if params["response"]["status"] >= 400:
                    response = params["response"]
                    wrong.append(f"answer {response['status']}: {response['url']}")
            elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
                words = [str(arg.get("value", arg)) for arg in params["args"]]
                wrong.append(f"console: {' '.join(words)}")
            elif method == "Runtime.exceptionThrown":
                wrong.append(f"exception: {params['exceptionDetails']['text']}")
            elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
                wrong.append(f"log: {params['entry']['text']}")
        return wrong

    def shoot(self, file: Path) -> None:
        """What the window shows, as PNG."""
        shot = self.call("Page.captureScreenshot")
        file.write_bytes(base64.b64decode(shot["data"]))

    def shoot_all(self, file: Path, size: tuple[int, int]) -> None:
        """The whole page, in a window as high as it; in tiles if it is long."""
        height = int(self.call("Page.getLayoutMetrics")["cssContentSize"]["height"])
        self.resize(size[0], min(height, TILE * TILES))
        for tile, top in enumerate(range(0, height, TILE)[:TILES]):
            part = {
                "x": 0,
                "y": top,
                "width": size[0],
                "height": min(TILE, height - top),
            }
            shot = self.call("Page.captureScreenshot", clip=part | {"scale": 1})
            name = f"{file.stem}-{tile}.png"
            file.with_name(name).write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.folder.cleanup()


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    """The site on a free port of this machine."""
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def check(
    browser: Browser, base: str, pages: list[str], shots: Path | None
) -> list[str]:
    """Look at every page in both sizes, light and dark."""
    wrong = []
    schemes = ["light", "dark"] if shots else ["light"]
    for page, size, scheme in itertools.product(pages, SIZES, schemes):
        browser.open(f"{base}/{page}", SIZES[size], scheme)
        found = browser.evaluate(LOOK) + browser.complaints()
        wrong += [f"{page} ({size}, {scheme}): {line}" for line in found]
        if shots:
            name = page.removesuffix(".html").replace("/", "-")
            browser.shoot_all(shots / f"{name}-{size}-{scheme}.png", SIZES[size])
    return wrong


def check_search(
    browser: Browser, base: str, query: str, shots: Path | None
) -> list[str]:
    """Type a query; the page must list results, without a network."""
    wrong = []
    for size in SIZES:
        browser.open(f"{base}/index.html", SIZES[size], "light")
        browser.evaluate("document.querySelector('label[for=__search]').click()")
        browser.evaluate("document.querySelector('.md-search__input').focus()")
        for letter in query:
            browser.call(
                "Input.dispatchKeyEvent", type="keyDown", text=letter, key=letter
            )
            browser.call("Input.dispatchKeyEvent", type="keyUp", key=letter)
        found = browser.evaluate(FOUND)
        print(f"search {query!r} ({size}): {found} links")
        if shots:
            browser.evaluate("new Promise((done) => setTimeout(done, 400))")
            browser.shoot(shots / f"search-{size}.png")
        wrong += browser.complaints()
        if not found:
            wrong.append(f"search for {query!r} ({size}) finds nothing")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, default=ROOT / "site")
    parser.add_argument("--shots", type=Path, help="folder for screenshots")
    parser.add_argument("--pages", nargs="*", help="default: all, without whole files")
    parser.add_argument("--query", default="attention")
    args = parser.parse_args()
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not program:
        print("no browser: install chromium to look at the pages; nothing was checked.")
        return 0
    if not (args.site / "index.html").exists():
        print(f"no site in {args.site}: build it first.")
        return 1
    if args.shots:
        args.shots.mkdir(parents=True, exist_ok=True)
    found = [p.relative_to(args.site).as_posix() for p in args.site.rglob("*.html")]
    found = [page for page in found if not page.startswith(("404", "source/"))]
    pages = args.pages or sorted(found)
    server = serve(args.site)
    base = f"http://127.0.0.1:{server.server_address[1]}"
    browser = Browser(program)
    try:
        wrong = check(browser, base, pages, args.shots)
        wrong += check_search(browser, base, args.query, args.shots)
    finally:
        browser.close()
        server.shutdown()
    print(f"{len(pages)} pages, {len(wrong)} complaints", *wrong, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
