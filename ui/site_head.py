"""The HTML head of the page, changed from Gradio's: its address, language, icon, and the preview of links to it."""

import re
from html import escape
from urllib.parse import urlsplit

from dsd_serve.errors import InputError
from ui import links
from ui.paths import ICON

# Gradio's own preview: its name, its logo, "Click to try out the app!".
PREVIEW = re.compile(rb"<meta\s+(?:property=\"og:|name=\"twitter:)[^>]*/>\s*")
MARK = b"<script data-gradio-mode>"
MANIFEST = b'<link rel="manifest" href="/manifest.json" />'  # of Gradio, with its logo
# Relative addresses start at the page's own, which may lack its last slash.
BASE = b'<base href="./" />'
# Gradio takes the server's address from the Host header and writes it into its page. Behind a proxy that does not pass
# Host on, such as nginx by default, only the browser knows the right one. Its own words follow the browser's language;
# all others of this page are English.
SCRIPT = (
    b"<script>gradio_config.root = location.origin + "
    b"new URL(gradio_config.root, location.href).pathname.replace(/\\/$/, '');"
    b"for (const [name, value] of [['language', 'en'], ['languages', ['en']]])"
    b" Object.defineProperty(navigator, name, {get: () => value, configurable: true});</script>"
)
ABOUT = "One small network encodes, denoises and decodes images. Draw some in the browser."


def rewritten(body: bytes, base: str, query: str) -> bytes:
    """The page with our head. base: its address, which ends with a slash. query: of the request."""
    body = PREVIEW.sub(b"", body).replace(MANIFEST, b"")
    if (path := urlsplit(base).path) != "/":
        body = body.replace(BASE, f'<base href="{escape(path)}" />'.encode(), 1)
    return body.replace(MARK, preview(base, query).encode() + SCRIPT + MARK, 1)


def preview(base: str, query: str) -> str:
    """The tags from which other sites make the preview of a link, and the icon. A link that names an image shows it."""
    try:
        link = links.read(query)
    except InputError:
        link = links.Link()
    values = {"title": "DSD", "type": "website", "description": ABOUT, "url": base}
    if link.draws and link.query:
        values |= {
            "title": f"DSD: seed {link.settings['seed']}",
            "url": f"{base}?{link.query}",
            "image": f"{base}studio/image/link.png?{link.first.query}",
        }
    tags = "".join(f'<meta property="og:{name}" content="{escape(value)}">' for name, value in values.items())
    card = "summary_large_image" if "image" in values else "summary"
    return (
        f'<link rel="icon" type="image/svg+xml" href="{ICON[1:]}"><meta name="description" content="{ABOUT}">{tags}'
        f'<meta name="twitter:card" content="{card}">'
    )
