"""Pages in a browser, and their content from a parser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "headless_shell")
# A window cannot be as narrow as a phone, but a frame can. Results are written into the only <pre>.
FRAME = """<!doctype html><iframe style="width:{width}px;height:800px;border:0" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{
  const inside = document.querySelector("iframe").contentWindow, seen = inside.document;
  const size = (text, at) => parseFloat(inside.getComputedStyle(text).fontSize) * Math.hypot(at.a, at.b);
  const sizes = [...seen.querySelectorAll("svg text")].map(text => size(text, text.getScreenCTM()));
  const found = {{
    width: inside.innerWidth, content: seen.documentElement.scrollWidth, texts: sizes.length,
    smallest: Math.min(...sizes), images: [...seen.images].every(image => image.complete && image.naturalWidth > 0),
    text: seen.documentElement.outerHTML,
  }};
  document.body.appendChild(document.createElement("pre")).textContent = JSON.stringify(found);
}});</script>"""


def find_browser():
    """The path of Chromium, from Debian's packages or playwright; None if it is missing."""
    downloaded = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or Path.home() / ".cache/ms-playwright")
    candidates = [*map(shutil.which, NAMES), *map(str, sorted(downloaded.glob("chromium*/chrome-linux*/*")))]
    return next((path for path in candidates if path and Path(path).name in NAMES), None)


def run(browser, folder, page, *options):
    """Runs Chromium without a network."""
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
               "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}", *options]  # fmt: skip
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measure(browser, folder, page, width):
    """Loads the page in a window of this width and returns what FRAME found in it."""
    frame = folder / f"{width}.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page.read_text(encoding="utf-8"))), encoding="utf-8")
    text = run(browser, folder, frame, "--window-size=1400,900", "--dump-dom")
    return json.loads(html.unescape(re.search("<pre>(.*)</pre>", text, re.DOTALL)[1]))


class Page(HTMLParser):
    """Reads tables as lists of rows of cells, texts of SVG by label of the chart, and references of the page."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.charts, self.references = [], {}, []
        self.cell = self.chart = None
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.references += [found[name] for name in ("src", "href", "srcset", "data", "action") if name in found]
        self.inside = tag
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True
        elif tag == "svg" and "aria-label" in found:
            self.chart = self.charts.setdefault(found["aria-label"], [])
        elif tag == "text" and self.chart is not None:
            self.chart.append("")

    def handle_endtag(self, tag):
        self.inside = ""
        if tag in ("td", "th"):
            self.cell = None
        elif tag == "svg":
            self.chart = None

    def handle_data(self, text):
        if self.cell:
            self.tables[-1][-1][-1] += text
        elif self.chart is not None and self.inside in ("text", "tspan"):
            self.chart[-1] += text
