"""The page: data, style and script in one file. It makes no request."""

from __future__ import annotations

import base64
import hashlib
import html
from importlib.resources import files

_ESCAPES = str.maketrans(
    {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
)
"""Inside of JSON these stand in strings alone; so nothing in the data can end the script."""


def page(title: str, data: str) -> bytes:
    """Return the whole page.

    Its policy allows the one script that is in it, by its hash, and no request at all.

    Args:
        title: As text.
        data: JSON.
    """
    folder = files(__package__)
    script = (folder / "page.js").read_text(encoding="utf-8")
    style = (folder / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)} - tcplat</title>
<style>{style}</style>
<main id="main"><noscript>This page is drawn by the script in it.</noscript></main>
<script type="application/json" id="data">{data.translate(_ESCAPES)}</script>
<script>{script}</script>
</html>
""".encode()
