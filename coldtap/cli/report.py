"""`coldtap report RUN… --out FILE.html`."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coldtap.cli.output import say
from coldtap.errors import ColdtapError, OptionError
from coldtap.text import show_bytes

if TYPE_CHECKING:
    from coldtap.adaptors.report import StoreReport, Thumbnails
    from coldtap.pipeline.images.sources import Source

SIDE = 96  # pixels of a thumbnail's longer side
QUALITY = 80


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders, or folders of trials.")],
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="Where to write the page.")] = Path("report.html"),
    source: Annotated[
        Path | None, typer.Option(help="Where the images are now, if not where they were cached from.")
    ] = None,
    images: Annotated[bool, typer.Option("--images/--no-images", help="Show images of the worst mistakes.")] = True,
) -> None:
    """Write one self-contained HTML page on finished runs: curves, classes, mistakes, costs, how to run them again."""
    from coldtap.adaptors.report import Thumbnails, read_report, render_page
    from coldtap.stores.storage.atomic import write_file

    if out.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"--out {out}: the page is HTML: choose a name such as {out.with_suffix('.html')}")
    if not images and source is not None:
        raise OptionError("--source and --no-images: give one of them")
    found = read_report(runs)
    none = Thumbnails(images={}, note="Images were left out, as asked.")
    page = render_page(found, [_thumbnails(store, source) if images else none for store in found.stores])
    data = page.encode()
    write_file(out, [data])
    more = f", {len(found.unfinished)} not finished" if found.unfinished else ""
    say(f"{out}: {len(found.runs)} finished runs{more}; {show_bytes(len(data))}")


def _thumbnails(store: "StoreReport", source: Path | None) -> "Thumbnails":
    """Images of the samples that the page wants, as far as they are still what was cached."""
    from coldtap.adaptors.report import Thumbnails, wanted_images
    from coldtap.pipeline.images.sources import open_source
    from coldtap.stores import open_store

    wanted = wanted_images(store)
    if not wanted:
        return Thumbnails(images={}, note=None)
    if store.problem is not None:
        return Thumbnails(images={}, note="There are no images: the store, which knows where they are, is not there.")
    opened = open_store(store.path)
    place = source or Path(opened.recorded["source"])
    try:
        images = open_source(place, labels="optional", seed=opened.recipe.rows.seed or 0)
        shown = dict(_shown(images, opened.samples, wanted))
    except (ColdtapError, OSError) as error:
        return Thumbnails(images={}, note=f"There are no images: {error} (--source names another place).")
    gone = len(wanted) - len(shown)
    why = f"{gone} of {len(wanted)} images are missing at {place}, broken, or no longer what was cached."
    return Thumbnails(images=shown, note=why if gone else None)


def _shown(images: "Source", samples: Any, wanted: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    from coldtap.pipeline.images.decode import BadImageError, content_digest

    places = {sample: index for index, sample in enumerate(images.listing.ids)}
    lines = samples.filter(pc.is_in(samples["sample_id"], pa.array(wanted, pa.string())))
    digests = dict(zip(lines["sample_id"].to_pylist(), lines["source_sha256"].to_pylist(), strict=True))
    for sample in wanted:
        if sample not in places:
            continue
        try:
            raw = images.read(places[sample])
            if content_digest(raw) == digests.get(sample):
                yield sample, _thumbnail(raw)
        except BadImageError:
            continue


def _thumbnail(raw: Any) -> bytes:
    from coldtap.pipeline.images.decode import decode_rgb

    image = decode_rgb(raw)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
