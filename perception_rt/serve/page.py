"""The web page: static files that may load nothing but each other and ask only this server."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent / "static"
# Path to file and type.
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/boxes.js": ("boxes.js", "text/javascript"),
    "/client.js": ("client.js", "text/javascript"),
    "/dom.js": ("dom.js", "text/javascript"),
}
PAGE_PATHS = tuple(_FILES)
# Images and videos are shown from memory (blob:) or from answers (data:).
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src blob: data:; media-src blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """The routes of the page, whose files are read once."""
    return [_route(path, *file) for path, file in _FILES.items()]


def _route(path: str, name: str, kind: str) -> Route:
    data = (_FOLDER / name).read_bytes()

    async def endpoint(_: Request) -> Response:
        return Response(data, media_type=kind, headers=_HEADERS)

    return Route(path, endpoint)
