"""Hostile uploads, generated deterministically."""

import functools
import gzip
import io
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, features

from dsd_serve.imaging.sanitize import png_chunk

PNG = b"\x89PNG\r\n\x1a\n"
MIB = 2**20


@dataclass
class Upload:
    name: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(7).integers(0, 256, (size, size, 3), dtype=np.uint8))


@functools.cache
def images() -> dict[str, bytes]:
    """A valid file of each supported kind."""
    return {
        "png": encoded(noise(), "PNG"),
        "jpeg": encoded(noise(), "JPEG"),
        "progressive": encoded(noise(), "JPEG", progressive=True),
        "webp": encoded(noise(), "WEBP"),
        "lossless": encoded(noise(), "WEBP", lossless=True),
        "alpha": encoded(noise().convert("RGBA"), "WEBP"),
    }


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2, data: bytes | None = None) -> bytes:
    """A PNG of these chunks between its header and its pixels; without data they are black, in RGB."""
    if data is None:
        data = zlib.compress(bytes((1 + 3 * width) * height))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"".join([PNG, png_chunk(b"IHDR", head), *chunks, png_chunk(b"IDAT", data), png_chunk(b"IEND", b"")])


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with these segments, (code, body), before its others."""
    made = b"".join(struct.pack(">BBH", 255, code, len(body) + 2) + body for code, body in segments)
    return jpeg[:2] + made + jpeg[2:]


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    place = next(i for i in (jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2")) if i > 0)
    return jpeg[: place + 5] + struct.pack(">HH", height, width) + jpeg[place + 9 :]


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    made = b"".join(kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2) for kind, body in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(made)) + b"WEBP" + made


def vp8x(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    extent = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"VP8X", bytes([flags, 0, 0, 0]) + extent


def exif_bomb(size: int, entries: int) -> bytes:
    """A directory whose entries all point at the same `size` bytes."""
    start = 10 + 12 * entries + 4
    made = [struct.pack("<HHII", 0x9000 + i, 7, size, start) for i in range(entries)]
    return b"II*\0" + struct.pack("<IH", 8, entries) + b"".join(made) + bytes(4) + bytes(size)


def scan_bomb(width: int, height: int, scans: int) -> bytes:
    """A progressive JPEG in which each scan has a few bytes and takes a pass over all blocks."""
    blocks = -(-width // 8) * -(-height // 8)
    runs = -(-blocks // 32767)
    code = "0" + "1" * 14  # end-of-band run of 2^14 + 16383 blocks
    bits = code * runs
    bits += "1" * (-len(bits) % 8)
    entropy = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    frame = struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\x00"
    table = b"\x10" + b"\x01" + bytes(15) + b"\xe0"
    start = b"\xff\xd8" + b"\xff\xdb\0\x43\0" + b"\1" * 64
    start += b"\xff\xc2" + struct.pack(">H", len(frame) + 2) + frame
    start += b"\xff\xc4" + struct.pack(">H", len(table) + 2) + table
    return start + (b"\xff\xda\0\x08\x01\x01\x00\x01\x3f\x00" + entropy) * scans + b"\xff\xd9"


def cut_files() -> Iterator[Upload]:
    for name, data in images().items():
        for length in np.linspace(1, len(data) - 1, 30).astype(int):
            yield Upload(f"{name} cut at {length} of {len(data)}", data[:length])


def flipped_pngs() -> Iterator[Upload]:
    data = images()["png"]
    for number in range(80):
        rng = random.Random(number)
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        yield Upload(f"png with bit {bit} of byte {place} flipped", flip(data, place, bit))


def fuzzed() -> Iterator[Upload]:
    """Damaged files that may still be images."""
    for name, data in images().items():
        for number in range(25):
            rng = random.Random(number)
            made = data
            for _ in range(1 + number % 4):
                made = flip(made, rng.randrange(min(len(data), 700)), rng.randrange(8))
            yield Upload(f"{name} fuzzed {number}", made)


def flip(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def wrong_headers() -> Iterator[Upload]:
    for depth in (0, 3, 5, 7, 32):
        for colour in range(8):
            yield Upload(f"png of {depth} bits, colour {colour}", png(8, 8, depth=depth, colour=colour))
    for width, height in ((0, 8), (8, 0), (0, 0), (2**31 - 1, 1), (2**32 - 1, 2**32 - 1)):
        yield Upload(f"png of {width} x {height}", png(width, height, data=b""))
    yield Upload("png of no data", png(8, 8, data=b""))
    yield Upload("png of garbage data", png(8, 8, data=b"garbage"))
    yield Upload("png of too little data", png(64, 64, data=zlib.compress(bytes(100))))
    yield Upload("png without a header", PNG + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b""))
    yield Upload("png with two headers", png(8, 8, png_chunk(b"IHDR", bytes(13))))
    yield Upload("png with a huge palette", png(8, 8, png_chunk(b"PLTE", bytes(9000))))
    yield Upload("png chunk that claims 4 GB", PNG + b"\xff\xff\xff\xffIHDR" + bytes(100))
    jpeg = images()["jpeg"]
    place = jpeg.find(b"\xff\xc0")
    for code in (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF):
        yield Upload(f"jpeg with frame {code:x}", jpeg[: place + 1] + bytes([code]) + jpeg[place + 2 :])
    for offset, values in ((4, (0, 2, 12, 16)), (9, (0, 2, 5, 255)), (11, (0, 0x10, 0x01, 0x55, 0xFF))):
        for value in values:
            made = jpeg[: place + offset] + bytes([value]) + jpeg[place + offset + 1 :]
            yield Upload(f"jpeg frame byte {offset} is {value}", made)
    for width, height in ((0, 8), (8, 0), (0, 0)):
        yield Upload(f"jpeg of {width} x {height}", with_size(jpeg, width, height))
    yield Upload("jpeg with two frames", jpeg[:place] + jpeg[place : place + 19] + jpeg[place:])
    second = with_size(jpeg, 8, 8)[place : place + 19]
    yield Upload("jpeg with a smaller frame behind its scan", jpeg[:-2] + second + jpeg[-2:])
    yield Upload("jpeg of a start and an end", b"\xff\xd8\xff\xd9")
    yield Upload("jpeg of markers", b"\xff\xd8\xff" + b"\xff" * 100_000)
    yield Upload("jpeg without quantisation", jpeg.replace(b"\xff\xdb", b"\xff\xec"))
    for size in (0, 1):
        yield Upload(f"jpeg segment of length {size}", b"\xff\xd8\xff\xe0" + struct.pack(">H", size) + jpeg[2:])
    yield Upload("webp without pixels", webp(vp8x(8, 8)))
    yield Upload("webp of nothing", webp())
    yield Upload("webp of short chunks", webp((b"VP8 ", b"\0")))
    yield Upload("webp that claims 4 GB", b"RIFF\xff\xff\xff\xffWEBP" + bytes(50))
    yield Upload("webp canvas that is larger", webp(vp8x(16, 16), (b"VP8L", images()["lossless"][20:])))
    yield Upload("webp that is not a key frame", webp((b"VP8 ", b"\1" + images()["webp"][21:])))


def bombs() -> Iterator[Upload]:
    for side in (6325, 20_000, 65_535, 100_000, 2**31 - 1):
        yield Upload(f"png that claims {side}^2", png(side, side, data=zlib.compress(bytes(10_000))))
    deep = zlib.compress(bytes(20_000 * 2501), 9)
    yield Upload("png of 20000^2, all there, 1 bit", png(20_000, 20_000, depth=1, colour=0, data=deep))
    for width, height in ((1, 40_000_000), (40_000_000, 1), (1, 65_536)):
        yield Upload(f"png of {width} x {height}", png(width, height, data=zlib.compress(bytes(10_000))))
    for name in ("jpeg", "progressive"):
        for width, height in ((65_500, 65_500), (65_535, 65_535), (65_535, 700)):
            yield Upload(f"{name} that claims {width} x {height}", with_size(images()[name], width, height))
    yield Upload("webp canvas of 2^24", webp(vp8x(2**24, 2**24), (b"VP8L", images()["lossless"][20:])))
    yield Upload(
        "webp canvas of 16384^2, animated", webp(vp8x(16384, 16384, 2), (b"ANIM", bytes(6)), (b"ANMF", bytes(24)))
    )
    yield Upload("lossless webp that claims 16384^2", webp((b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(50))))
    yield Upload("webp that claims 16383^2", webp((b"VP8 ", b"\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(50))))
    yield Upload(
        "webp of 36 megapixels, all there", encoded(Image.new("RGB", (6000, 6000)), "WEBP", lossless=True, method=0)
    )
    for scans in (65, 5000):
        yield Upload(f"jpeg of {scans} scans", scan_bomb(6000, 6000, scans))
    yield Upload("png of a million chunks", png(8, 8, png_chunk(b"prIv", b"") * 1_000_000))
    yield Upload("png of a million empty IDAT", png(8, 8, png_chunk(b"IDAT", b"") * 1_000_000))
    yield Upload("jpeg of a million segments", with_segments(images()["jpeg"], *[(0xFE, b"")] * 1_000_000))
    yield Upload("webp of a million chunks", webp(*[(b"junk", b"")] * 1_000_000))
    yield Upload("20 MB of FF", b"\xff\xd8" + b"\xff" * 19_000_000 + b"\0")


def animations() -> Iterator[Upload]:
    for frames in (2, 3, 40):
        made = [Image.new("RGB", (8, 8), (97 * i % 256, 255 - 6 * i, 0)) for i in range(frames)]
        for kind in ("PNG", "WEBP", "GIF"):
            yield Upload(f"{kind} of {frames} frames", encoded(made[0], kind, save_all=True, append_images=made[1:]))


@functools.cache
def other_files() -> dict[str, bytes]:
    image = noise(16)
    made = {
        kind: encoded(image, kind) for kind in ("GIF", "TIFF", "BMP", "ICO", "PPM", "PCX", "TGA", "SGI", "DDS", "PDF")
    }
    made |= {kind: encoded(image, kind) for kind in ("EPS", "ICNS", "IM")}
    made |= {kind: encoded(image.convert("1"), kind) for kind in ("MSP", "XBM")}
    for kind, feature in (("AVIF", "avif"), ("JPEG2000", "jpg_2000")):
        if features.check(feature):
            made[kind] = encoded(image, kind)
    archive, tar = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb", bytes(10 * MIB))
    with tarfile.open(fileobj=tar, mode="w") as file:
        file.addfile(tarfile.TarInfo("../../etc/passwd"))
    link = b'<image href="http://127.0.0.1:1/x" width="9" height="9"/>'
    entity = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
    return made | {
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">' + link + b"</svg>",
        "xml entities": b'<?xml version="1.0"?>' + entity + b"<svg>&b;</svg>",
        "html": b"<!doctype html><script>alert(1)</script>",
        "zip": archive.getvalue(),
        "tar": tar.getvalue(),
        "gzip": gzip.compress(images()["png"]),
        "pickle": pickle.dumps({"a": 1}),
        "elf": b"\x7fELF\x02\x01\x01" + bytes(100),
        "exe": b"MZ" + bytes(100),
        "psd": b"8BPS\0\x01" + bytes(100),
        "mp4": b"\0\0\0\x18ftypmp42" + bytes(100),
        "heic": b"\0\0\0\x18ftypheic" + bytes(100),
        "riff of sound": b"RIFF\x24\0\0\0WAVEfmt " + bytes(100),
        "url": b"http://169.254.169.254/latest/meta-data/",
        "path": b"/etc/passwd",
        "base64": b"data:image/png;base64,iVBORw0KGgo=",
        "json": b'{"image": "http://localhost/x.png"}',
        "zeros": bytes(100_000),
        "random": random.Random(1).randbytes(100_000),
        "signatures": PNG + b"\xff\xd8\xffRIFF",
        "one byte": b"\x89",
        "empty": b"",
    }


def wrong_files() -> Iterator[Upload]:
    for name, data in other_files().items():
        for media in ("image/png", "image/jpeg", "application/octet-stream"):
            yield Upload(f"{name} as {media}", data, {"content-type": media})


def wrong_types() -> Iterator[Upload]:
    data = images()["png"]
    for media in ("text/html", "text/plain", "application/json", "application/pdf", "video/mp4", "multipart/mixed"):
        yield Upload(f"a png as {media}", data, {"content-type": media})
    for encoding in ("gzip", "deflate", "br", "zstd", "gzip, identity", "nonsense"):
        yield Upload(f"content-encoding {encoding}", gzip.compress(data), {"content-encoding": encoding})
    yield Upload("a body above the limit", bytes(20_000_001))
    yield Upload("json above the limit", b" " * 1_000_001, {"content-type": "application/json"})


def form(*parts: tuple[str, bytes], boundary: str = "B", said: str | None = None, end: bytes = b"--") -> Upload:
    """A form of (headers, body) parts. said: a content-type instead of the right one."""
    made = b"".join(f"--{boundary}\r\n{headers}\r\n\r\n".encode() + body + b"\r\n" for headers, body in parts)
    body = made + f"--{boundary}".encode() + end + b"\r\n"
    return Upload("", body, {"content-type": said or f"multipart/form-data; boundary={boundary}"})


def forms() -> Iterator[Upload]:
    data = images()["png"]
    image = 'Content-Disposition: form-data; name="image"; filename="a.png"'
    text = 'Content-Disposition: form-data; name="image"'
    other = 'Content-Disposition: form-data; name="x{}"'
    good = (image, data)
    kind = "multipart/form-data"
    made = {
        "no boundary": form(good, said=kind),
        "empty boundary": form(good, said=f"{kind}; boundary="),
        "another boundary": form(good, said=f"{kind}; boundary=C"),
        "a boundary of 1000 letters": form(good, boundary="B" * 1000),
        "no end": form(good, end=b""),
        "no parts": form(),
        "an empty file": form((image, b"")),
        "text in place of a file": form((text, b"hello")),
        "the image twice": form(good, good),
        "another field": form((other.format(1), b"1")),
        "another field too": form(good, (other.format(1), b"1")),
        "thousands of fields": form(good, *[(other.format(i), b"1") for i in range(5000)]),
        "a huge field name": form((f'Content-Disposition: form-data; name="{"x" * 5000}"', b"1")),
        "a name of 4000 letters": form((f'Content-Disposition: form-data; name="{"x" * 4000}"', b"1")),
        "a huge file name": form((image.replace("a.png", "a" * 10_000), data)),
        "many headers in a part": form((image + "\r\nX-A: b" * 100, data)),
        "a huge header in a part": form((image + "\r\nX-A: " + "b" * 100_000, data)),
        "no name": form(("Content-Disposition: form-data", data)),
        "no disposition": form(("Content-Type: image/png", data)),
        "no headers": form(("", data)),
        "a header without colon": form(("nonsense", data)),
        "a name in wrong UTF-8": form(('Content-Disposition: form-data; name="im\xff\xfeage"', data)),
        "a nested form": form((text + "\r\nContent-Type: multipart/mixed; boundary=C", b"--C\r\n\r\nhello\r\n--C--")),
        "base64 in a part": form((image + "\r\nContent-Transfer-Encoding: base64", b"iVBORw0KGgo=")),
        "an svg in a form": form((image, other_files()["svg"])),
        "an image cut off in a form": form((image, data[:-20])),
        "a body that is not a form": Upload("", data, {"content-type": f"{kind}; boundary=B"}),
        "an empty body as a form": Upload("", b"", {"content-type": f"{kind}; boundary=B"}),
        "a form of line ends": Upload("", b"\r\n" * 3_000_000, {"content-type": f"{kind}; boundary=B"}),
        "a form of dashes": Upload("", b"-" * 6_000_000, {"content-type": f"{kind}; boundary=B"}),
        "a part of near boundaries": form((image, b"\r\n--b" * 1_000_000)),
        "a part of carriage returns": form((image, b"\r" * 6_000_000)),
    }
    for length in np.linspace(1, len(made["text in place of a file"].body) - 3, 20).astype(int):
        made[f"a form cut at {length}"] = Upload("", form(good).body[:length], form(good).headers)
    for name, upload in made.items():
        yield Upload(f"form: {name}", upload.body, upload.headers)


@functools.cache
def hostile() -> list[Upload]:
    """Uploads that must all be rejected."""
    kinds = (cut_files, flipped_pngs, wrong_headers, bombs, animations, wrong_files, wrong_types, forms)
    return [upload for kind in kinds for upload in kind()]


@functools.cache
def defused() -> list[Upload]:
    """Images whose metadata would take gigabytes or minutes if it were read."""
    text = [png_chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(900_000), 9)) for i in range(60)]
    large_text = png_chunk(b"tEXt", b"k\0" + b"x" * 15_000_000)
    exif = exif_bomb(60_000, 450)
    jpeg = images()["jpeg"]
    xmp = (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"x" * 60_000)
    segments = [(0xE1, b"Exif\0\0" + exif[place : place + 60_000]) for place in range(0, len(exif), 60_000)]
    small = Image.new("RGB", (8, 8))
    return [
        Upload("png of 60 zTXt bombs", png(8, 8, *text)),
        Upload("png of one zTXt bomb", png(8, 8, png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50 * MIB), 1)))),
        Upload("png with an iCCP bomb", png(8, 8, png_chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(50 * MIB), 1)))),
        Upload("png of much text", png(8, 8, large_text)),
        Upload("png with an EXIF bomb", png(8, 8, png_chunk(b"eXIf", exif_bomb(10_000_000, 20_000)))),
        Upload("jpeg with an EXIF bomb", with_segments(jpeg, *segments)),
        Upload("jpeg of much metadata", with_segments(jpeg, *[xmp] * 300)),
        Upload("jpeg with a thumbnail bomb", with_segments(jpeg, (0xE1, b"Exif\0\0" + with_size(jpeg, 65500, 65500)))),
        Upload(
            "webp with an EXIF bomb",
            webp(vp8x(48, 48, 8), (b"VP8L", images()["lossless"][20:]), (b"EXIF", exif_bomb(9_000_000, 5000))),
        ),
        Upload("jpeg and zip in one", jpeg + other_files()["zip"]),
        Upload("png and html in one", images()["png"] + other_files()["html"]),
        Upload("two images in a JPEG (MPO)", encoded(small, "MPO", save_all=True, append_images=[small])),
        Upload("more data than pixels", png(8, 8, data=zlib.compress(bytes(50 * MIB), 9))),
        Upload("64 scans", scan_bomb(6000, 6000, 64)),
    ]


@functools.cache
def large() -> list[Upload]:
    """The largest and most expensive images that are allowed."""
    plain = Image.new("RGB", (6320, 6320), (200, 30, 90))
    return [
        Upload("png, 40 MP", encoded(plain, "PNG", compress_level=1)),
        Upload("png, 40 MP, transparent", encoded(plain.convert("RGBA"), "PNG", compress_level=1)),
        Upload("jpeg, 40 MP, progressive", encoded(plain, "JPEG", progressive=True, subsampling=0)),
        Upload("jpeg, 40 MP, CMYK", encoded(plain.convert("CMYK"), "JPEG", progressive=True)),
        Upload("jpeg, 40 MP", encoded(plain, "JPEG")),
        Upload("webp, 23 MP", encoded(plain.crop((0, 0, 4800, 4800)), "WEBP", lossless=True, method=0)),
    ]
