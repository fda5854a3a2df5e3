"""The pages show what the report says, as text, in one file, and come into place as a whole."""

import base64
import html.parser
import os
import subprocess
import sys

import bucket
import pytest
import report_samples
from etils import epath

from itself_jax.reporting import content, page

requests = bucket.requests

SECTIONS = {
    "summary": "facts",
    "learning": "curves",
    "text-to-image": "text_to_image",
    "image-to-text": "image_to_text",
    "saliency": "overlays",
    "evolution": "evolutions",
    "fusion": "fusion",
    "measured": "measured",
    "notes": "notes",
}
EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(html.parser.HTMLParser):
    """A page's elements, as (name, attributes), and its text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.text += " " if tag in ("td", "th", "br") else ""

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def with_class(self, name):
        return [at for _, at in self.elements if name in (at.get("class") or "").split()]


@pytest.fixture
def report():
    return report_samples.report()


def test_every_section_stands_in_order_and_in_the_contents(report, tmp_path):
    index = Page(page.write(tmp_path / "report", report))
    assert [at["id"] for at in index.all("section")] == list(SECTIONS)
    links = [at["href"] for at in index.all("a")]
    assert links[: len(SECTIONS)] == [f"#{name}" for name in SECTIONS]
    assert links[len(SECTIONS) :] == ["failures.html"] * 2
    assert index.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in (
        index.all("meta")
    )
    for text in ("synthetic, MARS + ATS", "finished", "1 x cpu", "1 of 12 pictures cannot be read"):
        assert text in index.text


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "summary"])
def test_an_empty_section_is_left_out(report, tmp_path, name):
    report = report._replace(**{SECTIONS[name]: ()})
    index = Page(page.write(tmp_path / "report", report))
    assert [at["id"] for at in index.all("section")] == [x for x in SECTIONS if x != name]
    assert f"#{name}" not in [at["href"] for at in index.all("a")]


def test_a_report_of_nothing_but_a_title_is_a_page(tmp_path):
    nothing = content.Report("title", "no step logged yet", "", "", *[()] * 12)
    index = Page(page.write(tmp_path / "report", nothing))
    assert [at["id"] for at in index.all("section")] == ["summary"]
    assert "failures.html" not in [at["href"] for at in index.all("a")]
    assert "No query is shown here." in Page(tmp_path / "report" / "failures.html").text


def test_ranks_similarities_and_verdicts_are_the_true_ones(report, tmp_path):
    strip = report_samples.strip("median", 7)
    report = report._replace(text_to_image=(strip,), image_to_text=())
    index = Page(page.write(tmp_path / "report", report))
    assert "Median: first right answer at rank 7 of 600" in index.text
    for rank in range(1, 11):
        verdict = "✓right" if rank == 7 else "✗wrong"
        assert f"{verdict} {rank} {0.9 - rank / 100:.3f} " in index.text
    assert [("right" in at["class"], at["value"]) for at in index.with_class("hit")] == [
        (rank == 7, str(rank)) for rank in range(1, 11)
    ]


@pytest.mark.parametrize("picture", [False, True])
def test_a_right_answer_beyond_the_ten_is_shown_behind_them(report, tmp_path, picture):
    strip = report_samples.strip("worst", 412, picture=picture)
    name = "image_to_text" if picture else "text_to_image"
    report = report._replace(text_to_image=(), image_to_text=())._replace(**{name: (strip,)})
    index = Page(page.write(tmp_path / "report", report))
    assert "Worst: first right answer at rank 412 of 600" in index.text
    ranks = [at["value"] for at in index.with_class("answer" if picture else "hit")]
    assert ranks == [*map(str, range(1, 11)), "412"]
    assert len(index.with_class("far")) == 1
    assert f"✓right 412 {0.9 - 4.12:.3f}" in index.text


def test_text_of_data_and_settings_is_shown_and_never_run(report, tmp_path):
    crop = report_samples.CROP._replace(name=EVIL)
    hit = content.Hit(1, True, 0.5, crop=crop)
    lost = content.Hit(2, False, 0.4, crop=report_samples.LOST._replace(name=EVIL))
    answer = content.Hit(1, True, 0.5, caption=EVIL)
    views = (report_samples.view(EVIL)._replace(words=(content.Word(EVIL, 1, True),), alt=EVIL),)
    chart = report_samples.chart("loss")._replace(title=EVIL, alt=EVIL)
    report = report._replace(
        title=EVIL,
        state=EVIL,
        facts=((EVIL, EVIL),),
        differences=((EVIL, EVIL, EVIL),),
        results=(content.Table(EVIL, (EVIL,), ((EVIL,),)),),
        curves=(chart,),
        text_to_image=(content.Strip(EVIL, 1, 9, (hit, lost), hit, caption=EVIL),),
        image_to_text=(content.Strip(EVIL, 1, 9, (answer,), answer, crop=crop),),
        overlays=(
            content.Overlay(content.Crop(EVIL, None), EVIL, (*views, views[0]._replace(png=None))),
        ),
        failures=(content.Strip(EVIL, 1, 9, (hit, lost), hit, caption=EVIL),),
        notes=(EVIL,),
    )
    index = Page(page.write(tmp_path / "report", report))
    failures = Page(tmp_path / "report" / "failures.html")
    for found in (index, failures):
        assert not found.all("script")
        for _, attributes in found.elements:
            assert not [key for key in attributes if key.startswith("on")]
        assert all(at["src"].startswith("data:image/") for at in found.all("img"))
        assert EVIL in found.text
    assert index.text.count("alert(1)") > 12
    assert EVIL in [at["alt"] for at in index.all("img")]
    assert f"Picture {EVIL}" in [at["alt"] for at in index.all("img")]


def test_half_a_surrogate_pair_of_a_caption_costs_its_letter_alone(report, tmp_path):
    strip = report.text_to_image[0]._replace(caption="a man \ud83d in red")
    report = report._replace(text_to_image=(strip,), failures=(strip,))
    index = Page(page.write(tmp_path / "report", report))
    for found in (index, Page(tmp_path / "report" / "failures.html")):
        assert "a man ? in red" in found.text


def test_index_holds_all_pictures_and_nothing_from_elsewhere(report, tmp_path):
    path = page.write(tmp_path / "report", report)
    index = Page(path)
    assert not index.all("link") and not index.all("script") and not index.all("iframe")
    assert "default-src 'none'" in [at.get("content", "")[:18] for at in index.all("meta")]
    assert "url(" not in path.read_text() and "http" not in path.read_text().replace(
        "http-equiv", ""
    )
    pictures = index.all("img")
    assert all(at["alt"] for at in pictures)
    sources = [at["src"].partition(",")[2] for at in pictures]
    assert base64.b64encode(report.curves[0].png).decode() in sources
    assert base64.b64encode(report_samples.CROP.jpeg).decode() in sources


def test_charts_lie_beside_the_page_as_files(report, tmp_path):
    folder = page.write(tmp_path / "report", report).parent
    assert sorted(path.name for path in folder.iterdir()) == [
        *("failures.html", "fusion.png", "grad_norm.png", "index.html", "loss.png"),
        "measured-pointing.png",
    ]
    assert (folder / "loss.png").read_bytes() == report.curves[0].png


def test_charts_of_one_name_are_numbered(report, tmp_path):
    """As of a metric `bank` beside the charts' own, or of two without a letter of ASCII."""
    twice = report._replace(fusion=report.curves, measured=report.curves[:1])
    index = Page(page.write(tmp_path / "report", twice))
    names = ["loss.png", "grad_norm.png", "loss-2.png", "grad_norm-2.png", "loss-3.png"]
    assert [at["data-file"] for at in index.with_class("chart")] == names
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == set(names)


def test_pages_are_little_more_than_their_pictures(report, tmp_path):
    """Base64 takes 4 bytes for 3; the rest of a page is text."""
    path = page.write(tmp_path / "report", report)
    pictures = sum(len(at["src"]) for at in Page(path).all("img"))
    assert path.stat().st_size < pictures + 60_000
    assert (path.parent / "failures.html").stat().st_size < 150_000


def test_tables_have_a_caption_scopes_and_a_marked_row(report, tmp_path):
    index = Page(page.write(tmp_path / "report", report))
    assert len(index.all("caption")) == len(index.all("table")) == 2
    assert {at["scope"] for at in index.all("th")} == {"row", "col"}
    assert "local 20.00 fused@0.68 chosen 30.00 chance 0.75" in index.text
    assert len(index.with_class("marked")) == 1
    assert "batch_size 256 64" in index.text


def test_words_are_shaded_by_saliency_and_underlined_where_kept(report, tmp_path):
    words = (
        *(content.Word("green", 1.0, True), content.Word("coat", 0.25, False)),
        *(content.Word("much", 1.5, False), content.Word("nothing", -0.5, False)),
    )
    view = report_samples.view("mars")._replace(words=words)
    overlay = content.Overlay(content.Crop("a.jpg", None), "green coat", (view,))
    index = Page(page.write(tmp_path / "report", report._replace(overlays=(overlay,))))
    spans = [at for at in index.all("span") if "--shade" in at.get("style", "")][3:7]
    assert [at["style"] for at in spans] == [
        f"--shade: {x}" for x in ("1.00", "0.25", "1.00", "0.00")
    ]
    assert [at.get("class") for at in spans] == ["kept", None, None, None]
    assert "mars 24 patches kept" in index.text


def test_moments_say_epoch_and_share_of_new_patches(report, tmp_path):
    index = Page(page.write(tmp_path / "report", report))
    assert "epoch 1 24 patches" in index.text
    assert "epoch 8 24 patches 38 % new" in index.text


def test_a_picture_that_cannot_be_read_has_a_place_that_names_it(report, tmp_path):
    index = Page(page.write(tmp_path / "report", report))
    labels = [at["aria-label"] for at in index.with_class("missing")]
    assert "Picture imgs/lost.jpg could not be read" in labels
    assert "24 patches kept by last: picture imgs/0002.jpg could not be read" in labels


def test_a_new_report_replaces_the_old_one_as_a_whole(report, tmp_path):
    folder = page.write(tmp_path / "report", report).parent
    (folder / ".DS_Store").write_text("")
    page.write(folder, report._replace(title="another", curves=(), failures=()))
    assert "another" in Page(folder / "index.html").text
    assert not (folder / "loss.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def full(source, target):
    raise OSError(28, "No space left on device")


def test_a_failed_writing_leaves_the_old_report(report, tmp_path, monkeypatch):
    folder = page.write(tmp_path / "report", report).parent
    before = (folder / "index.html").read_bytes()
    monkeypatch.setattr(page.command, "move", full)
    with pytest.raises(OSError, match=r"cannot be written to .*report \(No space left on device\)"):
        page.write(folder, report._replace(title="another"))
    assert (folder / "index.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_what_a_killed_process_left_is_put_back_or_removed(report, tmp_path, monkeypatch):
    folder = page.write(tmp_path / "report", report).parent
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    # Killed between the two steps of `move`; and, at other times, before and after them.
    folder.rename(tmp_path / f".report.{killed.pid}.old")
    for name in (f".tmp-report-{killed.pid}", f".tmp-report-{os.getpid()}", ".tmp-report-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "loss.png").write_text("")
        if not name.endswith(f"-{os.getpid()}"):  # of a container that was started again at once
            os.utime(tmp_path / name, (0, 0))
    (tmp_path / f".report.{killed.pid}.tmp").mkdir()  # just now, perhaps on another machine
    with monkeypatch.context() as patched, pytest.raises(OSError, match="cannot be written"):
        patched.setattr(page.command, "move", full)
        page.write(folder, report._replace(title="another"))
    assert "synthetic, MARS + ATS" in Page(folder / "index.html").text
    (tmp_path / f".report.{killed.pid}.old").mkdir()
    page.write(folder, report._replace(title="another"))
    assert "another" in Page(folder / "index.html").text
    # Process 1 lives.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f".report.{killed.pid}.tmp", ".tmp-report-1", "report"),
    ]


def test_a_folder_that_is_no_reports_is_not_replaced(report, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(OSError, match="it holds 'thesis.tex', which no report wrote"):
        page.write(tmp_path / "mine", report)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"
    with pytest.raises(OSError, match="it is a file"):
        page.write(tmp_path / "mine" / "thesis.tex", report)
    (tmp_path / "mine" / "index.html").write_bytes(b"caf\xe9")
    with pytest.raises(OSError, match="it holds 'thesis.tex', which no report wrote"):
        page.write(tmp_path / "mine", report)


def test_a_report_in_a_bucket_has_the_same_files_and_none_of_the_last(report, tmp_path, requests):
    page.write("gs://bucket/run/report", report)
    here = page.write(tmp_path / "report", report._replace(curves=())).parent
    there = epath.Path(os.fspath(page.write("gs://bucket/run/report", report._replace(curves=()))))
    assert there.name == "index.html"
    assert {path.name: path.read_bytes() for path in there.parent.iterdir()} == {
        path.name: path.read_bytes() for path in here.iterdir()
    }
