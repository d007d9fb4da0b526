"""The documentation builds without a warning, its links lead somewhere, and nothing in it comes from a network."""

import html.parser
import pathlib
import subprocess
import sys
import urllib.parse

import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"

for name in ("sphinx", "pydata_sphinx_theme", "numpydoc", "sphinx_gallery", "myst_parser", "ziamath", "matplotlib", "sklearn"):
    pytest.importorskip(name, reason=f"the documentation needs {name}: tests/frameworks.sh docs")
pytestmark = pytest.mark.slow


class Page(html.parser.HTMLParser):
    """What a page of HTML links to, loads, and can be linked to at."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.anchors, self.images = [], [], {""}, 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes.get("id"), attributes.get("name")}
        self.images += tag == "img"
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        elif tag in ("link", "script", "img", "iframe"):
            self.loads += [attributes[name] for name in ("src", "href") if attributes.get(name)]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Of a build in which the examples ran: path and Page of each page."""
    to = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-E", "-d", str(to / "doctrees"), ".", str(to / "html")]
    done = subprocess.run(command, cwd=DOCS, capture_output=True, text=True, check=False)  # there `cbn` isn't the source
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Page(path) for path in (to / "html").rglob("*.html") if "_static" not in path.parts}


def test_links_lead_somewhere(pages):
    assert len(pages) > 20
    for path, page in pages.items():
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme:
                continue
            to = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            assert to.exists(), f"{path.name}: {link}"
            if to in pages:
                assert urllib.parse.unquote(url.fragment) in pages[to].anchors, f"{path.name}: {link}"


def test_nothing_is_loaded_from_elsewhere(pages):
    for path, page in pages.items():
        for load in page.loads:
            url = urllib.parse.urlsplit(load)
            assert url.scheme in ("", "data") and not url.netloc, f"{path.name}: {load}"
            assert url.scheme or (path.parent / urllib.parse.unquote(url.path)).exists(), f"{path.name}: {load}"


def test_the_gallery_shows_plots(pages):
    images = {path.stem: page.images for path, page in pages.items() if path.parent.name == "gallery"}
    assert images["digits"] and images["claims"]
