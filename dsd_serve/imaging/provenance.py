"""The origin of an image in its file: a mark that a model made it (IPTC, in XMP), and the settings to draw it again."""

import io
import json
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from PIL import Image

TEXT_KEY = "dsd"  # of the PNG text chunk that holds the settings as JSON
XMP_KEY = "XML:com.adobe.xmp"  # of the PNG text chunk that holds XMP (ISO 16684-1)
MAX_XMP = 100_000  # bytes of a packet that is read
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
DSD = "urn:dsd:1.0:"  # the namespace of our own property, `settings`
# https://cv.iptc.org/newscodes/digitalsourcetype
DRAWN = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
EDITED = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"


def xmp_of(settings: str, *, whole: bool) -> str:
    """The XMP packet of an image with these settings (JSON). whole: the settings themselves are in it."""
    source = DRAWN if is_drawn(json.loads(settings)) else EDITED
    own = f" xmlns:dsd={quoteattr(DSD)} dsd:settings={quoteattr(settings)}" if whole else ""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f'<rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about="" xmlns:Iptc4xmpExt="{IPTC}" '
        f'Iptc4xmpExt:DigitalSourceType="{source}"{own}/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )


def is_drawn(settings: Mapping[str, Any]) -> bool:
    """True for an image drawn from noise; False for one made from another image or from latents."""
    return ("seed" in settings or "from" in settings) and "strength" not in settings


def texts_of(settings: str) -> dict[str, str]:
    """The text chunks of a PNG with these settings (JSON)."""
    return {TEXT_KEY: settings, XMP_KEY: xmp_of(settings, whole=False)}


def settings_of(data: bytes) -> dict[str, Any] | None:
    """The settings in a PNG, JPEG or WebP file; None if it has none that can be read. Nothing is decoded.

    A file can say anything: types and ranges are for the caller to check.
    """
    try:
        file = Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"])
        found = json.loads(file.info.get(TEXT_KEY) or settings_in(file.info.get("xmp", b"")))
    except Exception:  # a decoder raises anything on broken input
        return None
    return found if isinstance(found, dict) else None


def settings_in(packet: bytes) -> str:
    """The settings in an XMP packet. Raises ValueError or ParseError."""
    if len(packet) > MAX_XMP or b"<!" in packet:  # a DTD could define entities without end
        raise ValueError("not a packet of ours")
    for description in ElementTree.fromstring(packet).iter(f"{{{RDF}}}Description"):
        if f"{{{DSD}}}settings" in description.attrib:
            return description.attrib[f"{{{DSD}}}settings"]
    raise ValueError("no settings")
