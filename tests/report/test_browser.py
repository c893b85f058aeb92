"""The page in a real browser: silent console, no request, all of it seen, on dark screens, small ones and paper too."""

import base64
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from recray.report.page import Contents, render


def _devtools() -> ModuleType:
    spec = importlib.util.spec_from_file_location("devtools", Path(__file__).parent / "devtools.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DEVTOOLS = _devtools()
PROGRAM = DEVTOOLS.find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome on the path or in RECRAY_BROWSER")

A4 = 718  # CSS pixels between margins of a centimetre

# What a reader must see, and where it lies: tables, pictures, headings and the opening sentence.
PLACES = """
[...document.querySelectorAll('table, svg, h1, h2, h3, dl, pre, .lead')].map(each => {
  const box = each.getBoundingClientRect(), style = getComputedStyle(each);
  return {name: each.tagName, width: box.width, height: box.height, right: box.right,
          seen: style.visibility === 'visible' && style.display !== 'none' && Number(style.opacity) > 0,
          scrolls: each.closest('.scroll') !== null};
})
"""
SHORT_OF_ROOM = """
[...document.querySelectorAll('.scroll')].filter(each => each.scrollWidth > each.clientWidth + 1)
  .map(each => each.querySelector('thead').textContent.replace(/\\s+/g, ' '))
"""
COLOURS = """
({paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  muted: getComputedStyle(document.querySelector('caption')).color})
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    assert PROGRAM is not None
    with ExitStack() as stack:
        try:
            found = stack.enter_context(DEVTOOLS.browser(PROGRAM, tmp_path_factory.mktemp("profile")))
        except (OSError, RuntimeError) as error:  # of the installation: no page has been opened
            pytest.skip(f"{PROGRAM} does not start here: {error}")
        yield found


@pytest.fixture
def page(contents: Contents, tmp_path: Path) -> Path:
    path = tmp_path / "report.html"
    path.write_text(render(contents), encoding="utf-8")
    return path


def _brightness(colour: str) -> float:
    """Return the relative luminance of `rgb(r, g, b)`: 0 black, 1 white (WCAG 2.1)."""
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    darker, lighter = sorted((_brightness(one), _brightness(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_the_console_is_silent_and_nothing_is_asked_for(tab: Any, page: Path) -> None:
    tab.open(page)
    assert tab.complaints() == []
    assert tab.requests() == [page.as_uri()]
    assert tab.run("document.title").endswith("demo")


def test_what_a_page_complains_of_or_asks_for_would_be_noticed(tab: Any, page: Path) -> None:
    fault = "<script>console.error('first')</script><script>throw new Error('second')</script><img src='gone.png'>"
    page.write_text(page.read_text(encoding="utf-8").replace("</main>", f"{fault}</main>"), encoding="utf-8")
    tab.open(page)
    told = " ".join(tab.complaints())
    assert "first" in told
    assert "second" in told
    assert tab.requests() == [page.as_uri(), page.with_name("gone.png").as_uri()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("media", "width"), [("screen", 1280), ("screen", 390), ("print", A4)])
def test_tables_and_pictures_are_seen(tab: Any, page: Path, media: str, scheme: str, width: int) -> None:
    tab.open(page)
    tab.see(media=media, scheme=scheme, width=width)
    places = tab.run(PLACES)
    counts = {name: sum(place["name"] == name for place in places) for name in ("TABLE", "svg", "H2")}
    assert counts["TABLE"] >= 11
    assert counts["svg"] >= 6
    assert counts["H2"] >= 13
    for place in places:
        assert place["seen"], place
        assert place["width"] > 40, place
        assert place["height"] > 8, place
        # What is wider than a screen scrolls in its own frame, and paper does not scroll; the page never does.
        assert (media == "screen" and place["scrolls"]) or place["right"] <= width + 1, place
    assert tab.run("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("media", "width"), [("screen", 1280), ("screen", 1000), ("print", A4)])
def test_no_column_is_cut_off(tab: Any, page: Path, media: str, width: int) -> None:
    tab.open(page)
    tab.see(media=media, width=width)
    assert tab.run(SHORT_OF_ROOM) == []


def test_dark_is_dark_and_paper_is_white_whatever_the_screen(tab: Any, page: Path) -> None:
    tab.open(page)
    shown = {}
    for media, scheme in (("screen", "light"), ("screen", "dark"), ("print", "light"), ("print", "dark")):
        tab.see(media=media, scheme=scheme)
        shown[media, scheme] = colours = tab.run(COLOURS)
        assert _contrast(colours["ink"], colours["paper"]) >= 7.0  # WCAG AAA for text, AA for what is muted
        assert _contrast(colours["muted"], colours["paper"]) >= 4.5
    assert _brightness(shown["screen", "dark"]["paper"]) < 0.05
    for bright in (("screen", "light"), ("print", "light"), ("print", "dark")):
        assert _brightness(shown[bright]["paper"]) > 0.9, bright


def test_pictures_take_the_colours_of_the_scheme(tab: Any, page: Path) -> None:
    tab.open(page)
    ink = {}
    for scheme in ("light", "dark"):
        tab.see(scheme=scheme)
        ink[scheme] = tab.run("[...document.querySelectorAll('svg text')].map(each => getComputedStyle(each).fill)")
        paper = tab.run("getComputedStyle(document.body).backgroundColor")
        assert len(ink[scheme]) > 30
    assert ink["light"] != ink["dark"]
    assert paper.startswith("rgb(")


def test_it_prints(tab: Any, page: Path) -> None:
    tab.open(page)
    pdf = base64.b64decode(tab.call("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF-")
    assert len(pdf) > 20_000
