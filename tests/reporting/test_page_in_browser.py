"""The pages in Chromium, from disk: nothing overflows, is missing or is complained of."""

import functools
import shutil

import pytest
import report_samples

from itself_jax.reporting import charts, page
from itself_jax.reporting import history as history_lib

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (extra `test`)")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None,
    reason="needs the programs chromium and chromedriver (Debian: chromium, chromium-driver)",
)
ALONE = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    "--disable-sync",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report with the charts of a run, and texts as long and as evil as they come."""
    root = tmp_path_factory.mktemp("browser")
    history = history_lib.read(report_samples.make_run(root / "run"))
    report = report_samples.report()
    long = "x" * 300
    report = report._replace(
        title="<script>alert(1)</script>",
        facts=(*history_lib.facts(history), (long, long)),
        differences=(*history.differences, (long, long, long)),
        results=history_lib.tables(history),
        curves=charts.curves(history),
        fusion=charts.fusion(history),
        measured=charts.measured(history),
        text_to_image=(*report.text_to_image, report.failures[0]._replace(caption=long)),
        overlays=(
            report.overlays[0]._replace(
                crop=report.overlays[0].crop._replace(name=long), caption=long
            ),
        ),
        notes=(long, "'\"><img src=x onerror=alert(1)>"),
    )
    return page.write(root / "report", report).parent


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for argument in (*ALONE, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


def opened(browser, path, width):
    """The page as a screen of this width shows it."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.get(path.as_uri())
    return functools.partial(browser.execute_script)


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["index.html", "failures.html"])
def test_a_page_fits_and_is_whole(browser, folder, name, width):
    run = opened(browser, folder / name, width)
    assert run("return innerWidth") == width
    assert run("return document.documentElement.scrollWidth") <= width
    assert run("return document.body.scrollWidth") <= width
    pictures = run(
        "return [...document.images].map(i => [i.complete && i.naturalWidth > 0, i.alt !== ''])"
    )
    assert len(pictures) > 10
    assert all(shown and named for shown, named in pictures)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 390])
def test_wide_tables_scroll_in_their_own_box(browser, folder, width):
    run = opened(browser, folder / "index.html", width)
    boxes = run("return [...document.querySelectorAll('.scroll')].map(b => b.clientWidth)")
    assert boxes and max(boxes) <= width
    inside = run(
        "return [...document.querySelectorAll('table')].every(t => t.closest('.scroll') !== null)"
    )
    assert inside


def test_charts_and_crops_are_large_enough_to_be_read_on_a_phone(browser, folder):
    run = opened(browser, folder / "index.html", 390)
    charts_at = run("return [...document.querySelectorAll('.chart img')].map(i => i.width)")
    crops = run("return [...document.querySelectorAll('.hit .crop')].map(i => i.width)")
    assert min(charts_at) >= 340
    assert min(crops) >= 56


def test_the_ten_answers_and_the_right_one_stand_in_one_row_on_a_desk(browser, folder):
    run = opened(browser, folder / "index.html", 1280)
    tops = run(
        "return [...document.querySelectorAll('#text-to-image .hits')]"
        ".map(o => new Set([...o.children].map(c => c.offsetTop)).size)"
    )
    assert tops == [1] * len(tops) and tops


def test_links_between_the_pages_and_to_sections_lead_somewhere(browser, folder):
    run = opened(browser, folder / "index.html", 1280)
    targets = run("return [...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))")
    for target in targets:
        if target.startswith("#"):
            assert run("return document.querySelector(arguments[0]) !== null", target)
        else:
            assert (folder / target).exists()


def test_text_of_data_runs_nothing(browser, folder):
    run = opened(browser, folder / "index.html", 1280)
    assert run("return document.querySelector('h1').textContent") == "<script>alert(1)</script>"
    assert run("return document.querySelectorAll('main script').length") == 0
