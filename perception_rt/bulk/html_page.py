"""Shows what a search found as one HTML file, which loads nothing from anywhere.

Images are small copies inside the file. Links to the originals are relative to the page.
"""

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from perception_rt.bulk.atomic import write_bytes
from perception_rt.bulk.contents import image_of
from perception_rt.bulk.search import Hit
from perception_rt.bulk.sources import VIDEOS
from perception_rt.errors import PerceptionError, escaped
from perception_rt.processing.image_options import DEFAULT_IMAGE_OPTIONS, ImageOptions
from perception_rt.processing.thumbnail import thumbnail

THUMBNAIL_SIDE = 320

# Images are in the page, videos beside it; nothing else may load, whatever a source is called.
_POLICY = (
    "default-src 'none'; img-src data:; media-src 'self' file:; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
_STYLE = """
:root { color-scheme: light dark; font-family: system-ui, sans-serif; }
body { margin: 1.5rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
p { color: GrayText; }
ol { display: grid; gap: 1rem; list-style: none; padding: 0;
  grid-template-columns: repeat(auto-fill, minmax(min(11rem, 100%), 1fr)); }
li { border: 1px solid GrayText; border-radius: 0.5rem; overflow: hidden; }
img, video { display: block; width: 100%; height: 11rem; object-fit: contain; }
.none { display: grid; height: 11rem; padding: 0 1rem; place-items: center; overflow: hidden;
  color: GrayText; }
.query { height: auto; max-height: 11rem; width: auto; }
small { display: block; padding: 0.5rem; overflow-wrap: anywhere; }
"""


def write_page(
    out: str | os.PathLike[str],
    hits: Sequence[Hit],
    *,
    text: str | None = None,
    image: str | None = None,
    note: str = "",
    column: str | None = None,
    options: ImageOptions = DEFAULT_IMAGE_OPTIONS,
) -> int:
    """Writes the page completely or not at all.

    Args:
        out: file to write.
        hits: what was found, best first. Paths in sources are relative to the working folder, as
            they were for the job.
        text: text of the query.
        image: path of the query's image.
        note: a line below the title.
        column: as for `Contents`.
        options: how images are opened.

    Returns:
        How many hits have a picture or a video.
    """
    out = Path(out)
    title = escape(escaped(text or "an image"))
    items = [_item(rank, hit, out, column, options) for rank, hit in enumerate(hits, 1)]
    query = "" if image is None else _picture(image, options, "query")
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{title}</title>",
        f"<style>{_STYLE}</style>",
        "</head>",
        "<body>",
        f"<h1>{title}</h1>",
        *filter(None, [query]),
        f"<p>{escape(escaped(note))}</p>",
        "<ol>",
        *(line for line, _ in items),
        "</ol>",
        "</body>",
        "</html>",
        "",
    ]
    write_bytes(out, "\n".join(lines).encode("utf-8"))
    return sum(shown for _, shown in items)


def _item(
    rank: int, hit: Hit, page: Path, column: str | None, options: ImageOptions
) -> tuple[str, bool]:
    """A hit as HTML, and whether it is shown."""
    name = escape(escaped(hit.source))
    link = _link(hit.source, page)
    shown = _video(hit.source, link) or _picture(image_of(hit.source, column), options)
    body = shown or '<span class="none">no picture</span>'
    if link and not body.startswith("<video"):
        body = f'<a href="{link}">{body}</a>'
    return f"<li>{body}<small>{rank}. {hit.score:.4f} {name}</small></li>", bool(shown)


def _picture(source: str | bytes | None, options: ImageOptions, kind: str = "") -> str:
    """An image as HTML; empty if it is unusable."""
    if source is None:
        return ""
    try:
        data, width, height = thumbnail(source, THUMBNAIL_SIDE, options)
    except PerceptionError:
        return ""
    encoded = base64.b64encode(data).decode("ascii")
    attributes = f' class="{kind}"' if kind else ""
    return (
        f'<img{attributes} alt="" width="{width}" height="{height}" '
        f'src="data:image/jpeg;base64,{encoded}">'
    )


def _video(source: str, link: str) -> str:
    """A video as HTML, which plays the file itself; empty if the source is none."""
    if not link or Path(source).suffix[1:].lower() not in VIDEOS:
        return ""
    return f'<video controls preload="metadata" src="{link}"></video>'


def _link(source: str, page: Path) -> str:
    """URL of a file relative to the page; empty if the source is no file."""
    try:
        if not os.path.isfile(source):  # noqa: PTH113 - a text may be no valid path
            return ""
        relative = os.path.relpath(source, page.parent)
    except ValueError:  # a null character, or another drive
        return ""
    # "./" keeps a name such as "javascript:x" from being a scheme.
    return "./" + quote(os.fsencode(relative.replace(os.sep, "/")))
