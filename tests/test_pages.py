"""The pages as a browser shows them: on a phone, on a desk, in the dark, by keyboard and on paper."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import test_engine_compare as engines
import test_outcome as outcome
import test_report as report
import test_report_audit as audits
import test_report_pruning as pruning
from resvit_calibrate.data.overlap import Overlap
from resvit_engines.targets.speed_verdict import Evidence, SpeedKind, SpeedVerdict
from resvit_export.report.comparison import write_comparison
from resvit_export.report.layout.data import ReportData
from resvit_export.report.page import html_from_run
from resvit_export.report.sections.compare import write_comparison_page
from resvit_quantize.qdq.held_back import OURS, HeldBackCheck, MendedLayer, Tried

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="pages are looked at with Playwright: pip install playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(CHROMIUM is None, reason="pages are looked at in Chromium: sudo apt-get install chromium"),
]
PHONE, DESK, PAPER = (390, 844), (1280, 900), (673, 900)
"""CSS pixels; of paper what A4 has between its margins."""

OUTSIDE = """() => [...document.querySelectorAll('body *')].filter(element => {
  for (let at = element; at; at = at.parentElement) {
    if (['auto', 'scroll'].includes(getComputedStyle(at).overflowX) || at.tagName === 'svg') return false;
  }
  const box = element.getBoundingClientRect();
  return box.width > 0 && (box.right > innerWidth + 1 || box.left < -1);
}).concat([...document.querySelectorAll('svg text')].filter(element => {
  const box = element.getBoundingClientRect();
  return box.width > 0 && (box.right > innerWidth || box.left < 0);
})).map(element => element.tagName + '.' + element.className + ': ' + element.textContent.slice(0, 40))"""
"""What lies beyond the edge of the window, and does not scroll by itself."""
BROKEN = """() => [...document.querySelectorAll('.num, .num > span')].filter(element => {
  const range = document.createRange();
  range.selectNodeContents(element);
  return new Set([...range.getClientRects()].map(box => Math.round(box.bottom / 4))).size > 2;
}).map(element => element.textContent)"""
"""Numbers that take more than two lines: broken in the middle."""
NARROW = """() => [...document.querySelectorAll('td, th, dt, dd')].filter(element => {
  const text = element.textContent.trim();
  const range = document.createRange();
  range.selectNodeContents(element);
  const lines = new Set([...range.getClientRects()].map(box => Math.round(box.bottom / 4))).size;
  return lines > 3 && text.length / lines < 5;
}).map(element => element.textContent.trim().slice(0, 40))"""
"""Cells so narrow that their words stand upright, a letter or two in each line."""
CONTRAST = """() => {
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const over = (colours) => {
    context.fillStyle = '#fff';
    context.fillRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const box = element.getBoundingClientRect();
    if (!walker.currentNode.textContent.trim() || !box.width || element.closest('title, style, .drawn svg')) continue;
    const style = getComputedStyle(element);
    const below = [];
    for (let at = element; at; at = at.parentElement) below.unshift(getComputedStyle(at).backgroundColor);
    const text = element.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(over([...below, text])), light(over(below))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && parseInt(style.fontWeight) >= 700);
    const words = walker.currentNode.textContent.trim().slice(0, 40);
    if (ratio < (large ? 3 : 4.5)) found.push(ratio.toFixed(2) + ': ' + words);
  }
  return found;
}"""
"""Text that is nearer to its ground than WCAG 2 allows (AA)."""


def everything() -> ReportData:
    """A build in which all happened that can: pruned, checked on held-back images, audited, with what overlaps."""
    tried = (
        Tried(OURS, 18.2, 0.986),
        Tried("without ranges at the output and smoothing", 14.9, 0.978, -3.3, 1.5),
        Tried("all methods, 1 layer in FP16", 20.9, 0.99, 2.7, 0.4),
    )
    mended = (MendedLayer("trunk.stages.1.0.shortcut.conv.with.a.long.name/Conv", 0.31, 0.004),)
    held = HeldBackCheck(16, False, tried, tried[2].what, mended)
    return dataclasses.replace(
        report.full(),
        prune=pruning.PRUNE,
        retrain=pruning.RETRAIN,
        quantize=report.quantize(held_back=held.to_json()),
        verdict=report.verdict(overlap=Overlap(3, 20, 4000, 512).to_json()),
        audit=audits.audit(),
        next_commands=[
            (
                "resvit-export keygen release.key && resvit-export sign "
                "'runs of mine/bundle-07032eee3764/vit_small_r26_s32_224-jetson-orin-int8.resvit' --key release.key",
                "sign it: devices take no unsigned bundle by hand",
            ),
            ("resvit-export build --run runs/x --device ssh://USER@HOST", "build, validate and time it there"),
        ],
        preprocess=[
            ("resize", "until it covers 256 x 256, bicubic; 224 x 224 from the middle"),
            ("normalise", "pixels / 255, less mean 0.485, 0.456, 0.406, over std 0.229, 0.224, 0.225"),
        ],
        speed=SpeedVerdict(SpeedKind.FP16_ITSELF, 1.0, Evidence.SAME, None, "FP16, predicted 0.204 ms on X", ""),
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of each kind, with all that can be on it."""
    folder = tmp_path_factory.mktemp("pages")
    made: dict[str, Callable[[Path], Any]] = {
        **{
            f"build {kind}": lambda path, kind=kind: path.write_text(html_from_run(report.full(kind)))
            for kind in ("accepted", "rejected", "undecided")
        },
        "build everything": lambda path: path.write_text(html_from_run(everything())),
        "runs": lambda path: write_comparison(
            [
                outcome.entry("a-run-with-a-rather-long-name-of-its-own", 1.0, 0.8, 10.0),
                outcome.entry("good", 2.0, 0.9),
                outcome.entry("close", 2.02, 0.899, 0.1),
                outcome.entry("slow", 80.0, 0.91, target="jetson-orin"),
            ],
            path,
        ),
        "engines": lambda path: write_comparison_page(
            path, engines.compared(folder, engines.RESNET50[1], engines.RESNET50[2])
        ),
    }
    found = {name: folder / f"{name.replace(' ', '-')}.html" for name in made}
    for name, path in found.items():
        made[name](path)
    return found


KINDS = ("build accepted", "build rejected", "build undecided", "build everything", "runs", "engines")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        # In a container's root there is no sandbox; the pages are our own.
        running = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def shown(browser: Any, pages: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Opens a page in a window of a size; what the page complains of fails the test."""
    opened: list[Any] = []
    said: list[str] = []

    def show(kind: str, size: tuple[int, int], **how: str) -> Any:
        page = browser.new_page(viewport={"width": size[0], "height": size[1]}, **how)
        opened.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        page.goto(pages[kind].as_uri())
        return page

    yield show
    for page in opened:
        page.close()
    assert said == []


@pytest.mark.parametrize("size", [PHONE, DESK, (320, 640)], ids=["phone", "desk", "small phone"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_runs_off_the_screen_and_no_number_is_broken(shown, kind: str, size: tuple[int, int]) -> None:
    page = shown(kind, size)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(BROKEN) == []
    assert page.evaluate(NARROW) == []
    assert "\\u" not in page.inner_text("body"), "a character that cannot be seen"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_text_stands_out_from_its_ground(shown, kind: str, scheme: str) -> None:
    page = shown(kind, DESK, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate(CONTRAST) == []


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_opens_is_reached_by_keyboard_and_shows_it(shown, kind: str) -> None:
    page = shown(kind, PHONE)
    count = page.evaluate("document.querySelectorAll('summary, a[href]').length")
    scrolling = page.evaluate(
        "[...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1 && "
        "['auto', 'scroll'].includes(getComputedStyle(e).overflowX)).length"
    )
    reached = 0
    for _ in range(count + scrolling):
        page.keyboard.press("Tab")
        at = page.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e); "
            "return [e.tagName, s.outlineStyle, parseFloat(s.outlineWidth), e.parentElement.open]; })()"
        )
        assert at[0] != "BODY"
        assert at[1] != "none"
        assert at[2] >= 1
        if at[0] == "SUMMARY":
            reached += 1
            page.keyboard.press("Enter")
            assert page.evaluate("document.activeElement.parentElement.open") is not at[3]
            page.keyboard.press("Enter")
    assert reached == page.evaluate("document.querySelectorAll('summary').length")


@pytest.mark.parametrize("kind", KINDS)
def test_a_print_has_everything_in_black_on_white(shown, kind: str, tmp_path: Path) -> None:
    page = shown(kind, PAPER, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER[0]
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate(CONTRAST) == []
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("kind", KINDS)
def test_tables_stay_tables_for_those_who_hear_them(shown, kind: str) -> None:
    """Rows that stand one above the other on a phone are no table any more, but by their roles."""
    page = shown(kind, PHONE)
    assert page.evaluate("document.querySelectorAll('table.stack:not([role=table])').length") == 0
    assert page.get_by_role("heading", level=1).count() == 1
    for table in page.get_by_role("table").all():
        assert table.get_by_role("row").count() > 0
    unnamed = "document.querySelectorAll('svg:not([role=img]):not([aria-hidden=true]), img:not([alt])').length"
    assert page.evaluate(unnamed) == 0
