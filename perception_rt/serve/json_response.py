"""JSON in ASCII, which any string of a client survives, also half of a surrogate pair."""

import json
from typing import Any

from starlette.responses import JSONResponse


class AsciiJson(JSONResponse):
    """A response of plain JSON values."""

    def render(self, content: Any) -> bytes:
        """Writes the body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")
