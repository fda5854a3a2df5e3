"""A report as pages: `index.html` holds all of it in one file; beside it lies a page of failures.

The charts are written as PNGs too. Nothing in a page is run or fetched: a policy in its head
forbids both, and every text is escaped.
"""

import base64
import os
import pathlib
from collections.abc import Iterable

import jinja2
import markupsafe

from itself_jax import command, files
from itself_jax.data import remote
from itself_jax.reporting import content

INDEX, FAILURES = "index.html", "failures.html"
_CHARTS = ("curves", "fusion", "measured")  # of a report
_HERE = pathlib.Path(__file__).parent


def write(folder: str | os.PathLike, report: content.Report) -> files.Path:
    """Writes the report's pages and PNGs into `folder`, in place of an older report there.

    On a disk a reader sees the old report or the new one, or for a moment between them none; a
    process that is killed then leaves the old one for the next writing to put back. In a bucket
    each file is the old or the new one for itself.

    Returns:
      The path of `index.html`.

    Raises:
      OSError: the folder cannot be written, or holds something that is no report's; one sentence.
    """
    report = _with_names_apart(report)
    pages = {f"{chart.name}.png": chart.png for part in _CHARTS for chart in getattr(report, part)}
    # Last: whoever sees a new index in a bucket finds its neighbours.
    pages[FAILURES] = _render("failures.html", report)
    pages[INDEX] = _render("page.html", report)
    place = files.place(folder)
    try:
        with files.reaching(place):
            if remote.is_local(place):
                command.settle(place)
            _refuse_strangers(place)
            if remote.is_local(place):
                _write_folder(place, pages)
            else:
                _write_objects(place, pages)
    except OSError as error:
        raise OSError(
            f"The report cannot be written to {place} ({error.strerror or error}): make room "
            "there, or give another folder."
        ) from error
    return place / INDEX


def _write_folder(folder: pathlib.Path, pages: dict[str, bytes]) -> None:
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        with command.folders_above(folder):
            temporary.mkdir()
            for name, data in pages.items():
                (temporary / name).write_bytes(data)
            command.move(temporary, folder)
    finally:
        files.remove(temporary)


def _write_objects(folder: files.Path, pages: dict[str, bytes]) -> None:
    for name, data in pages.items():
        files.write(folder / name, lambda file, data=data: file.write(data))
    for entry in folder.iterdir():
        if entry.name not in pages:  # a chart that an older report had
            entry.unlink()


def _refuse_strangers(folder: files.Path) -> None:
    """A new report replaces the folder as a whole: it must be nobody else's."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError("it is a file")
    index = folder / INDEX
    before = index.read_bytes().decode("utf-8", "replace") if index.exists() else ""
    for entry in folder.iterdir():
        is_ours = entry.name in (INDEX, FAILURES) or f'data-file="{entry.name}"' in before
        if not is_ours and not entry.name.startswith("."):  # as file managers leave them
            raise FileExistsError(f"it holds {entry.name!r}, which no report wrote")


def _with_names_apart(report: content.Report) -> content.Report:
    """Charts of one name are numbered: metrics may differ in what no file's name keeps."""
    taken: set[str] = set()

    def own(chart: content.Chart) -> content.Chart:
        name, number = chart.name, 1
        while name in taken:
            number += 1
            name = f"{chart.name}-{number}"
        taken.add(name)
        return chart._replace(name=name)

    parts = {part: tuple(map(own, getattr(report, part))) for part in _CHARTS}
    return report._replace(**parts)


def _render(template: str, report: content.Report) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["uri"] = _uri
    environment.filters["slashes"] = _with_breaks
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    style = markupsafe.Markup((_HERE / "page.css").read_text(encoding="utf-8"))
    page = environment.get_template(template).render(
        r=report, style=style, index=INDEX, failures=FAILURES, sections=_sections(report)
    )
    return page.encode("utf-8", "replace")  # half a surrogate pair of a caption is no letter


def _sections(report: content.Report) -> tuple[tuple[str, str], ...]:
    """(anchor, heading) of what there is to show, in the order of the page."""
    known: Iterable[tuple[str, str, object]] = (
        ("summary", "Summary", True),
        ("learning", "What it learned", report.curves),
        ("text-to-image", "Text → image", report.text_to_image),
        ("image-to-text", "Image → text", report.image_to_text),
        ("saliency", "Where it looks", report.overlays),
        ("evolution", "How its look changed", report.evolutions),
        ("fusion", "Global and local together", report.fusion),
        ("measured", "Saliency, measured", report.measured),
        ("notes", "Notes", report.notes),
    )
    return tuple((anchor, heading) for anchor, heading, shown in known if shown)


def _uri(data: bytes, kind: str) -> markupsafe.Markup:
    """The bytes of a picture as an address, for one file that holds all."""
    return markupsafe.Markup(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")


def _with_breaks(name: str) -> markupsafe.Markup:
    """A path that may be broken after its slashes."""
    return markupsafe.Markup("/<wbr>").join(name.split("/"))
