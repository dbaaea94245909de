"""The pages in a real browser, from a file: they load nothing, log no error, and the divider moves."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kdpipe.pipeline.evaluation.compare import compare
from kdpipe.pipeline.reports.html.comparison import comparison_tiles, write_comparison
from kdpipe.pipeline.reports.html.page import heading, page, paragraph, table
from kdpipe.pipeline.reports.html.run import report_run, write_report
from kdpipe.pipeline.reports.html.tiles import VIEWER, browser, draw_tile
from kdpipe.pipeline.reports.html.verify import ParityTiles, write_verification
from kdpipe.pipeline.runs.record import read_run
from kdpipe.pipeline.verify.gate import verify

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
CPU = torch.device("cpu")
MODES = ("light", "dark")
EVIL = "</title></script>'\"><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here (apt-get install chromium)"),
    pytest.mark.long,
]


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """The pages of the two runs: a report, a verification and a comparison."""
    folder, (at, config) = tmp_path_factory.mktemp("pages"), trained
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        runs = [Path("model_weights/tests") / name for name in ("tiny", "tiny-none")]
        write_report([report_run(runs[0], CPU, tiles=4)], folder / "report.html")
        tiles = ParityTiles(config)
        verified = verify(config, "parity", CPU, sample=2, on_parity=tiles)
        write_verification(verified, config, tiles.drawn, folder / "parity.html")
        read = [read_run(run) for run in runs]
        comparison = compare(read)
        drawn, notes = comparison_tiles(comparison, {id(r): run for r, run in zip(read, runs, strict=True)}, CPU, 2)
        assert notes == []
        write_comparison(comparison, folder, drawn, notes)
    return folder


@pytest.fixture(scope="module")
def run_page(folder):
    """The page of a run: two validation and two training tiles."""
    return folder / "report.html"


class Opened:
    """A page in its own tab, with what it loaded and the errors that it logged."""

    def __init__(self, chromium, file: Path, **options):
        self.context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.context.set_default_timeout(120_000)  # ms: machines may be busy
        self.tab = self.context.new_page()
        self.asked, self.complaints = [], []
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.goto(file.as_uri())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def open_tile(self, number):
        self.tab.locator(".tiles button").nth(number).click()

    def clip(self):
        """The end of the left layer and the start of the right one, in percent, as the browser computed them."""
        ends = []
        for side, place in (("left", 1), ("right", 3)):
            found = self.tab.locator(f".layer.{side}").evaluate("layer => getComputedStyle(layer).clipPath")
            sides = re.findall(r"(?:calc\([^)]*\)|[\d.]+%?(?:px)?)", found.removeprefix("inset("))
            ends.append(sides[place])
        return ends

    def shown_left(self):
        """Width in px of the visible left layer, which is the place of the divider, and of the stage."""
        stage, divider = (self.tab.locator(name).bounding_box() for name in (".stage", ".stage .divider"))
        return divider["x"] + divider["width"] / 2 - stage["x"], stage["width"]

    def alt(self, side):
        return self.tab.locator(f".layer.{side} img").get_attribute("alt")


@pytest.fixture
def opened(chromium, run_page):
    with Opened(chromium, run_page) as page_there:
        yield page_there
        assert page_there.complaints == []
        assert {url.split(":")[0] for url in page_there.asked} <= {"file", "data"}
        assert [url for url in page_there.asked if url.startswith("file:")] == [run_page.as_uri()]


def test_the_divider_moves_by_keyboard_and_shows_more_of_the_left_layer(opened):
    opened.open_tile(2)
    place, width = opened.shown_left()
    assert place == pytest.approx(width / 2, abs=1)
    before = opened.clip()
    for _ in range(20):
        opened.tab.keyboard.press("ArrowRight")
    place, width = opened.shown_left()
    assert place == pytest.approx(0.7 * width, abs=1)
    assert opened.clip() != before
    assert opened.tab.get_by_role("slider").get_attribute("aria-valuetext") == "70 % image, 30 % label"
    opened.tab.keyboard.press("Home")
    assert opened.shown_left()[0] == pytest.approx(0, abs=1)


def test_the_divider_follows_the_pointer(opened):
    opened.open_tile(2)
    box = opened.tab.locator(".stage").bounding_box()
    middle = box["y"] + box["height"] / 2
    mouse = opened.tab.mouse
    mouse.move(box["x"] + box["width"] / 2, middle)
    mouse.down()
    for share in (0.6, 0.8, 0.25):
        mouse.move(box["x"] + share * box["width"], middle, steps=3)
        assert opened.shown_left()[0] == pytest.approx(share * box["width"], abs=0.012 * box["width"])
    mouse.up()


def test_the_two_layers_lie_left_and_right_of_the_divider(opened):
    """In the pixels of a screenshot: the label has few colours, the image has many."""
    import io

    from PIL import Image

    opened.open_tile(2)
    opened.tab.keyboard.press("2")
    opened.tab.keyboard.press("Shift+1")
    assert (opened.alt("left").split(": ")[1], opened.alt("right").split(": ")[1]) == ("label", "image")
    opened.tab.wait_for_function("[...document.querySelectorAll('.layer img')].every(image => image.complete)")
    picture = np.asarray(Image.open(io.BytesIO(opened.tab.locator(".stage").screenshot())).convert("RGB"))
    height, width = picture.shape[:2]
    inner = picture[height // 8 : height // 3]  # away from the thumb
    left, right = inner[:, width // 20 : width * 9 // 20], inner[:, width * 11 // 20 : width * 19 // 20]
    few, many = (len(np.unique(part.reshape(-1, 3), axis=0)) for part in (left, right))
    assert few <= 8
    assert many > 100


def test_keys_turn_tiles_choose_layers_and_close(opened):
    opened.open_tile(0)
    title = opened.tab.locator("#viewer-title")
    names = opened.tab.locator(".tiles li").evaluate_all("items => items.map(item => item.dataset.tile)")
    assert title.inner_text() == names[0]
    assert opened.tab.get_by_role("button", name="Previous").is_disabled()
    for number in (1, 2, 3, 3):
        opened.tab.keyboard.press("n")
        assert title.inner_text() == names[number]
    assert opened.tab.get_by_text("4 of 4").is_visible()
    opened.tab.keyboard.press("p")
    assert title.inner_text() == names[2]
    opened.tab.keyboard.press("3")
    opened.tab.keyboard.press("Shift+4")
    assert (opened.alt("left"), opened.alt("right")) == (f"{names[2]}: soft target", f"{names[2]}: entropy")
    opened.tab.keyboard.press("Escape")
    assert not opened.tab.locator("dialog").is_visible()
    assert opened.tab.evaluate("document.activeElement.closest('li').dataset.tile") == names[2]


def test_a_missing_layer_is_named(opened):
    opened.open_tile(0)
    opened.tab.locator("[data-part=left]").select_option("soft target")
    assert opened.tab.locator(".layer.left").inner_text() == "no soft target of this tile"
    opened.tab.keyboard.press("Escape")
    opened.tab.get_by_label("Show").select_option("soft target")
    assert opened.tab.locator(".tiles .absent:visible").count() == 2
    assert opened.tab.locator(".tiles img:visible").count() == 2


def test_the_grid_can_be_ordered(opened):
    def rights():
        return opened.tab.locator(".tiles li").evaluate_all(
            "items => items.map(i => JSON.parse(i.dataset.figures)['% right'])"
        )

    listed = rights()
    opened.tab.get_by_label("Order").select_option(label="% right: largest first")
    assert rights() == sorted(listed, reverse=True)
    opened.tab.get_by_label("Order").select_option(label="nats of entropy: smallest first")
    there = opened.tab.locator(".tiles li").evaluate_all(
        "items => items.map(i => 'nats of entropy' in JSON.parse(i.dataset.figures))"
    )
    assert there == [True, True, False, False]
    opened.tab.get_by_label("Order").select_option(label="as listed")
    assert rights() == listed


def test_every_picture_has_an_alt_and_every_control_a_name(opened):
    opened.open_tile(2)
    for image in opened.tab.locator("img").all():
        assert image.get_attribute("alt")
    for figure in opened.tab.locator("svg[role=img]").all():
        assert figure.get_attribute("aria-label")
    # As the browser describes it to a screen reader.
    client = opened.context.new_cdp_session(opened.tab)
    nodes = client.send("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "slider", "combobox", "link", "image", "img", "dialog", "table", "region")
    told = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"] and "role" in n]
    named = [(role, name) for role, name in told if role in roles]
    assert {"button", "slider", "combobox", "dialog"} <= {role for role, _ in named}
    assert [role for role, name in named if not name] == []
    assert {("button", "Close"), ("combobox", "Left"), ("combobox", "Right")} <= set(named)


LUMINANCE = """element => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  let ground = element;
  while (parse(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
  const [a, b] = [light(parse(getComputedStyle(element).color)), light(parse(getComputedStyle(ground).backgroundColor))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


@pytest.mark.parametrize("mode", MODES)
def test_text_can_be_read_in_both_modes(chromium, run_page, mode):
    """WCAG 2 demands a contrast of 4.5, on either background."""
    with Opened(chromium, run_page, color_scheme=mode) as there:
        tab = there.tab
        places = "main p|.quiet|td|thead th|.figures dt|.figures dd|button|select|.facts|.legend li|summary"
        for place in places.split("|"):
            assert tab.locator(place).first.evaluate(LUMINANCE) >= 4.5, place
        fill = "e => { e.style.color = getComputedStyle(e.querySelector('text')).fill; return 0 }"
        figure = tab.locator("figure svg[role=img]").first
        figure.evaluate(fill)
        assert figure.evaluate(LUMINANCE) >= 4.5
        # The darkest background that a cell of the confusion can have.
        cell = tab.locator(".confusion td").first
        cell.evaluate("e => { e.style.background = 'var(--heat)'; }")
        assert cell.evaluate(LUMINANCE) >= 4.5
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 28)"}[mode]
        assert there.complaints == []


def test_numbers_do_not_run_into_bars(chromium, run_page):
    with Opened(chromium, run_page) as there:
        ends = there.tab.locator("td.bar:has(i)").evaluate_all(
            "cells => cells.map(cell => [cell.querySelector('span'), cell.querySelector('i'), cell]"
            ".map(part => part.getBoundingClientRect()).map(box => [box.left, box.right, box.width]))"
        )
        assert len(ends) > 20
        for (_, number_end, _), (bar_start, bar_end, _), (_, cell_end, _) in ends:
            assert number_end < bar_start
            assert bar_end <= cell_end
        shares = there.tab.locator("td.bar i").evaluate_all(
            "bars => bars.map(b => Number(b.style.getPropertyValue('--share')))"
        )
        longest = max(range(len(shares)), key=shares.__getitem__)
        assert ends[longest][1][2] > 20  # px: a bar can be seen


@pytest.mark.parametrize("width", [400, 1280])
def test_a_narrow_window_needs_no_scrolling_sideways(chromium, run_page, width):
    with Opened(chromium, run_page, viewport={"width": width, "height": 800}) as there:
        of_dialog = "(d => d.scrollWidth - d.clientWidth)(document.querySelector('dialog'))"
        measure = f"[document.documentElement.scrollWidth, {of_dialog}]"
        assert there.tab.evaluate(measure)[0] <= width
        there.open_tile(2)
        page_width, beyond = there.tab.evaluate(measure)
        assert page_width <= width
        assert beyond <= 0
        stage = there.tab.locator(".stage").bounding_box()
        assert stage["x"] >= 0
        assert stage["x"] + stage["width"] <= width


def test_the_page_does_not_shift_after_it_is_shown(chromium, run_page):
    with Opened(chromium, run_page) as there:
        shift = there.tab.evaluate(
            "new Promise(done => { let sum = 0; new PerformanceObserver(list => list.getEntries().forEach(e => sum += e.value))"
            ".observe({type: 'layout-shift', buffered: true}); setTimeout(() => done(sum), 300); })"
        )
        assert shift < 0.01


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("parity.html", ["image", "label", "soft target", "entropy", "|Δp|"]),
        ("comparison.html", ["image", "label", "student tiny-none", "student tiny", "errors tiny-none", "errors tiny"]),
    ],
)
def test_pages_of_verification_and_comparison_browse_tiles_too(chromium, folder, name, layers):
    with Opened(chromium, folder / name) as there:
        assert there.tab.locator("[data-choose=layer] option").all_text_contents() == layers
        there.open_tile(1)
        there.tab.keyboard.press("Shift+5")
        assert there.alt("right").endswith(layers[4])
        there.tab.keyboard.press("End")
        place, width = there.shown_left()
        assert place == pytest.approx(width, abs=1)
        assert there.complaints == []
        assert [url for url in there.asked if not url.startswith("data:")] == [(folder / name).as_uri()]


def test_markup_in_names_is_shown_and_not_run(chromium, tmp_path):
    image = np.full((40, 60, 3), 90, np.uint8)
    labels = np.zeros((40, 60), int)
    tile = draw_tile(EVIL, EVIL, image, 2, labels_HW=labels, predictions={EVIL: labels})
    parts = [
        heading(1, EVIL),
        paragraph(EVIL),
        table(EVIL, [[EVIL], [EVIL]]),
        browser([tile], [EVIL, "</script>"]),
        VIEWER,
    ]
    file = tmp_path / "evil.html"
    file.write_text(page(EVIL, "".join(parts), script=True), encoding="utf-8")
    with Opened(chromium, file) as there:
        there.open_tile(0)
        there.tab.keyboard.press("3")
        assert there.tab.locator("#viewer-title").inner_text() == EVIL
        assert there.alt("left") == f"{EVIL}: student {EVIL}"
        assert there.tab.title() == EVIL  # and not "ran"
        assert there.complaints == []


def test_the_pages_own_policy_stops_what_is_not_escaped(chromium, tmp_path):
    """The second line of defence: markup that did get into the page can neither run nor load."""
    file = tmp_path / "leak.html"
    file.write_text(
        page("safe", f"{EVIL}<img src='https://example.org/x.png' alt='x'>", script=False), encoding="utf-8"
    )
    with Opened(chromium, file) as there:
        there.tab.wait_for_timeout(200)
        assert there.tab.title() == "safe"
        assert sum("Content Security Policy" in complaint for complaint in there.complaints) >= 3
