"""The documentation: its examples run, its images are those of its code, its links have targets."""

from __future__ import annotations

import doctest
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pages
import pytest
from PIL import Image
from sphinx.cmd.build import main as sphinx_build

from corrmatch import ops

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    "README.md",
    "CONTRIBUTING.md",
    *(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")),
]
API = sorted(page for page in (ROOT / "docs/api").glob("*.md") if page.stem != "index")


@pytest.mark.parametrize("page", [ROOT / "README.md", *API], ids=lambda page: page.stem)
def test_examples_run(page):
    pages.run(page)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("text\n```python\n>>> 1 + 1\n3\n```\n", doctest.DocTestFailure),
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", AssertionError),
        ("```bash\nls\n```\n", ValueError),
    ],
    ids=["printed", "raised", "missing"],
)
def test_wrong_examples_are_found(tmp_path, text, error):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(error):
        pages.run(tmp_path / "page.md")


def test_examples_of_a_page_share_their_names(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```python\n>>> x\n1\n>>> y = x + 1\n```\n\n```python\nz = y + 1\n```\n")
    assert pages.run(page)["z"] == 3


def test_images_are_those_of_the_code(tmp_path):
    pages.draw(tmp_path)
    drawn = sorted(tmp_path.iterdir())
    assert len(drawn) == 4
    for image in drawn:
        fresh, kept = (
            np.asarray(Image.open(x).convert("RGB"), np.float32) for x in (image, pages.DOCS / "tutorial" / image.name)
        )
        assert fresh.shape == kept.shape, image.name
        assert abs(fresh - kept).mean() < 2, image.name


def test_every_function_has_a_page():
    text = "".join(page.read_text() for page in API)
    named = set(re.findall(r"autofunction:: corrmatch\.ops\.(\w+)", text))
    assert named == set(ops.__all__)


class Links(HTMLParser):
    """The anchors of an HTML page, and the targets of its links."""

    def __init__(self, text):
        super().__init__()
        self.places, self.targets = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.places.add(value)
            elif name in ("href", "src") and value:
                self.targets.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    assert sphinx_build(["-q", "-nW", "--keep-going", str(ROOT / "docs"), str(folder)]) == 0
    return folder


def test_links_of_the_site_lead_somewhere(site):
    found = {page: Links(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")}
    dead, checked = [], 0
    for page, links in found.items():
        for target in links.targets:
            if re.match(r"[a-z]+:", target):
                continue  # elsewhere; `sphinx-build -b linkcheck` asks for those
            path, _, place = unquote(target).partition("#")
            to = (page.parent / path.partition("?")[0]).resolve() if path else page
            alive = to.exists() and (not place or to.suffix != ".html" or place in found[to].places)
            checked += 1
            if not alive:
                dead.append(f"{page.relative_to(site)}: {target}")
    assert not dead
    assert checked > 500


def test_tables_of_backends_and_formulas_are_there(site):
    page = (site / "api/pixel_propagate.html").read_text(encoding="utf-8")
    table = [re.sub(r"<[^>]+>|\s+", " ", row).split() for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)]
    assert ["triton", "GPU", "no", "yes", "yes", "yes", "at", "most", "256"] in table
    assert ["cpu", "CPU", "yes", "yes", "yes", "yes", "any", "number"] in table
    assert "softmax}_j" in page


@pytest.mark.parametrize("page", SOURCES)
def test_links_in_the_sources_lead_somewhere(page):
    """Links in the sources have targets too, for readers of the repository."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), target
