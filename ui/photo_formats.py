"""Files that visitors choose as photos: other formats are named, with what to do, before they go to the server."""

from dsd_serve.errors import InputError
from ui.private_files import read_upload

# How a file of a format begins -> its name, and what to do.
HEIC = dict.fromkeys((b"heic", b"heix", b"hevc", b"mif1", b"msf1"), "HEIC")
ISO_BRANDS = {**HEIC, b"avif": "AVIF", b"avis": "AVIF"}
SIGNATURES = {
    b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%PDF": "PDF", b"<svg": "SVG", b"<?xml": "SVG",
    b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL": "JPEG XL",
}  # fmt: skip
SHARED = {"HEIC": "share or export it as JPEG, then choose that file"}
CONVERT = "save it as PNG, JPEG or WebP, then choose that file"


def read_photo(path: str) -> bytes:
    """The bytes of an uploaded photo. Raises InputError for a file that is gone, empty, or of a format that no server
    reads."""
    data = read_upload(path)
    if not data:
        raise InputError("this file is empty: choose another")
    if name := other_format(data):
        article = "an" if name in ("AVIF", "SVG") else "a"
        raise InputError(f"this is {article} {name} file, which cannot be read here: {SHARED.get(name, CONVERT)}")
    if not data.startswith((b"\x89PNG", b"\xff\xd8", b"RIFF")):
        raise InputError("this file is not a PNG, JPEG or WebP image: choose another")
    return data


def other_format(data: bytes) -> str:
    """The name of a known format that is not PNG, JPEG or WebP; empty otherwise."""
    if data[4:8] == b"ftyp":
        return ISO_BRANDS.get(data[8:12], "")
    return next((name for begin, name in SIGNATURES.items() if data.startswith(begin)), "")
