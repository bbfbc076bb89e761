"""Sanitising PNG, JPEG and WebP files: their structure is parsed within limits, and nothing is decoded.

Decoders trust what a file says about itself: metadata that unpacks a thousandfold, directories that point at the same
bytes again and again, canvases that are allocated before their size can be checked. So no decoder sees an uploaded
file. `inspect` walks it and keeps only the parts that hold the image: `ImageFile.data` is a new file of these, without
metadata, further images or data after the end.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from dsd_serve.errors import InputError

Bytes = bytes | memoryview

MAX_SIDE = 65_535  # JPEG's limit, for all: decoders take memory for each row, however short
MAX_PARTS = 20_000  # chunks or segments of one file; real images have a few thousand at most
MAX_SCANS = 64  # of a JPEG; encoders write about ten, and each costs a pass over the whole image
SLACK = 16_000_000  # bytes that decoding takes in addition to the pixels

PNG = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = {b"IHDR": 13, b"PLTE": 768, b"tRNS": 256}  # and their largest sizes in bytes
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # neither a stuffed byte nor a restart: ends a scan
JPEG_BARE = {0x01, 0xD8}  # markers without a length
JPEG_END, JPEG_SCAN, JPEG_EXIF = 0xD9, 0xDA, 0xE1
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive, all with Huffman coding
JPEG_OTHER_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
JPEG_TABLES = {0xC4, 0xDB, 0xDD, 0xE0, 0xEE}  # DHT, DQT, DRI; JFIF and Adobe, which tell the colour space
JPEG_READ = {JPEG_SCAN, JPEG_EXIF} | JPEG_FRAMES | JPEG_OTHER_FRAMES | JPEG_TABLES


@dataclass(frozen=True)
class ImageFile:
    """A file that holds one still image and nothing else.

    orientation: of EXIF, 1 to 8. coefficient_bytes: memory of a decoder for the coefficients of a JPEG in several
    passes.
    """

    format: str
    width: int
    height: int
    orientation: int
    data: bytes
    coefficient_bytes: int = 0

    def memory(self, shrink: int = 1) -> int:
        """The most bytes that decoding takes, the file included. shrink: the factor by which a JPEG is decoded smaller.

        Pillow holds 4 bytes a pixel, and libwebp with its wrapper three more images.
        """
        pixels = self.width * self.height // shrink**2
        return pixels * (16 if self.format == "WEBP" else 4) + self.coefficient_bytes + len(self.data) + SLACK


def inspect(data: bytes) -> ImageFile:
    """The one still image in a PNG, JPEG or WebP file. Raises InputError for anything else.

    The size in pixels is not limited, except that each side must be from 1 to MAX_SIDE.
    """
    try:
        if data[:8] == PNG:
            found = inspect_png(memoryview(data))
        elif data[:3] == b"\xff\xd8\xff":
            found = inspect_jpeg(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            found = inspect_webp(memoryview(data))
        else:
            raise InputError("the bytes are not a readable image: send a PNG, JPEG or WebP")
    except (struct.error, IndexError):
        raise cut_off() from None
    if not (0 < found.width <= MAX_SIDE and 0 < found.height <= MAX_SIDE):
        raise InputError(f"the image has {found.width} x {found.height} pixels; each side must be from 1 to {MAX_SIDE}")
    return found


def cut_off() -> InputError:
    return InputError("the image is broken: the file is truncated; send the whole file")


def broken(why: str) -> InputError:
    return InputError(f"the image is broken and cannot be decoded ({why})")


def animated(frames: int) -> InputError:
    return InputError(f"the image is animated ({frames} frames); send a single image")


def inspect_png(data: memoryview) -> ImageFile:
    kept: dict[bytes, memoryview] = {}
    pixels: list[memoryview] = []
    turn = 1
    for kind, body, crc in png_chunks(data):
        if kind == b"acTL" and (frames := struct.unpack_from(">I", body)[0]) > 1:
            raise animated(frames)
        if kind in PNG_KEPT or kind in (b"IDAT", b"eXIf"):
            if zlib.crc32(body, zlib.crc32(kind)) != crc:
                raise broken(f"a checksum of its {kind.decode()} chunk does not match")
            if kind == b"IDAT":
                pixels.append(body)
            elif kind == b"eXIf":
                turn = orientation(bytes(body))
            elif kind in kept or len(body) > PNG_KEPT[kind]:
                raise broken(f"it has two {kind.decode()} chunks or one that is too large")
            else:
                kept[kind] = body
    if b"IHDR" not in kept or not pixels:
        raise broken("a PNG must have the chunks IHDR and IDAT")
    width, height = struct.unpack_from(">II", kept[b"IHDR"])
    parts = [(kind, kept[kind]) for kind in PNG_KEPT if kind in kept] + [(b"IDAT", b"".join(pixels)), (b"IEND", b"")]
    return ImageFile("PNG", width, height, turn, b"".join([PNG, *(png_chunk(kind, body) for kind, body in parts)]))


def png_chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview, int]]:
    """(kind, body, checksum) of each chunk before IEND, which is required."""
    place = 8
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, place)
        (crc,) = struct.unpack_from(">I", data, place + 8 + length)
        if kind == b"IEND":
            return
        yield kind, data[place + 8 : place + 8 + length], crc
        place += 12 + length
    raise InputError(f"the image has more than {MAX_PARTS:,} chunks; save it again with another program")


def png_chunk(kind: bytes, body: Bytes) -> bytes:
    return b"".join([struct.pack(">I4s", len(body), kind), body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))])


def inspect_jpeg(data: bytes) -> ImageFile:
    kept: list[Bytes] = []
    frame = b""  # code of its marker and body
    scans, many_passes, turn = 0, False, None
    for code, segment in jpeg_segments(data):
        body = segment[4:]
        if code in JPEG_OTHER_FRAMES:
            raise InputError(
                "the JPEG is lossless, hierarchical or arithmetic-coded; send it as baseline or progressive"
            )
        if code == JPEG_EXIF:
            if turn is None and bytes(body[:6]) == b"Exif\0\0":
                turn = orientation(bytes(body))
            continue
        if code in JPEG_FRAMES:
            if frame:
                raise broken("it has two frame headers")
            frame = bytes([code]) + body
        elif code == JPEG_SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise InputError(f"the JPEG has more than {MAX_SCANS} scans; save it again with fewer, or as baseline")
            many_passes = many_passes or frame[0] == 0xC2 or body[0] < frame[6]
        kept.append(segment)
    if not scans:
        raise broken("a JPEG must have a frame header and a scan")
    height, width = struct.unpack_from(">HH", frame, 2)
    coefficients = 2 * jpeg_samples(frame, width, height) if many_passes else 0
    return ImageFile("JPEG", width, height, turn or 1, b"".join([b"\xff\xd8", *kept, b"\xff\xd9"]), coefficients)


def jpeg_segments(data: bytes) -> Iterator[tuple[int, memoryview]]:
    """(code of the marker, bytes from the marker on) of each relevant segment before the end of the image.

    A scan includes its entropy-coded data. The end of the image is required.
    """
    view, place = memoryview(data), 2
    for _ in range(MAX_PARTS):
        marker = JPEG_MARKER.search(data, place)
        if marker is None:
            raise cut_off()
        code, start = data[marker.start() + 1], marker.start()
        if code == JPEG_END:
            return
        place = start + 2
        if code in JPEG_BARE:
            continue
        (length,) = struct.unpack_from(">H", data, place)
        place += length
        if length < 2:
            raise cut_off()
        if code == JPEG_SCAN:
            after = JPEG_MARKER.search(data, place)
            if after is None:
                raise cut_off()
            place = after.start()
        if code in JPEG_READ:
            yield code, view[start:place]
    raise InputError(f"the image has more than {MAX_PARTS:,} segments; save it again with another program")


def jpeg_samples(frame: bytes, width: int, height: int) -> int:
    """Samples of all components: the coefficients that a decoder keeps of a JPEG in several passes."""
    factors = [divmod(frame[8 + 3 * i], 16) for i in range(frame[6])]
    if not factors or not all(1 <= across <= 4 and 1 <= down <= 4 for across, down in factors):
        raise broken("its sampling factors must be from 1 to 4")
    most_across, most_down = (max(values) for values in zip(*factors, strict=True))
    units = -(-width // (8 * most_across)) * -(-height // (8 * most_down))
    return units * 64 * sum(across * down for across, down in factors)


def inspect_webp(data: memoryview) -> ImageFile:
    canvas: tuple[int, int] | None = None
    alpha: memoryview | None = None
    pixels: tuple[bytes, memoryview] | None = None
    frames, turn = 0, 1
    for kind, body in webp_chunks(data):
        if kind == b"VP8X" and canvas is None:
            canvas = little(body[4:7]) + 1, little(body[7:10]) + 1
        elif kind in (b"ANIM", b"ANMF"):
            frames += kind == b"ANMF"
        elif kind == b"EXIF":
            turn = orientation(bytes(body))
        elif kind == b"ALPH" and alpha is None:
            alpha = body
        elif kind in (b"VP8 ", b"VP8L") and pixels is None:
            pixels = kind, body
    if frames:
        raise animated(frames)
    if pixels is None:
        raise broken("a WebP must have a VP8 or VP8L chunk")
    width, height = webp_size(*pixels)
    if canvas not in (None, (width, height)):
        raise broken("its canvas is not as large as its image")
    parts = [pixels]
    if alpha is not None and pixels[0] == b"VP8 ":
        extent = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        parts = [(b"VP8X", memoryview(b"\x10\0\0\0" + extent)), (b"ALPH", alpha), pixels]
    chunks = b"".join(webp_chunk(kind, body) for kind, body in parts)
    return ImageFile(
        "WEBP", width, height, turn, b"".join([b"RIFF", struct.pack("<I", 4 + len(chunks)), b"WEBP", chunks])
    )


def webp_chunks(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """(kind, body) of each chunk."""
    end = 8 + little(data[4:8])
    if end > len(data):
        raise cut_off()
    place = 12
    for _ in range(MAX_PARTS):
        if place + 8 > end:
            return
        kind, length = struct.unpack_from("<4sI", data, place)
        if place + 8 + length > end:
            raise cut_off()
        yield kind, data[place + 8 : place + 8 + length]
        place += 8 + length + length % 2
    raise InputError(f"the image has more than {MAX_PARTS:,} chunks; save it again with another program")


def webp_size(kind: bytes, body: memoryview) -> tuple[int, int]:
    """Width and height in the header of a VP8 or VP8L stream."""
    if kind == b"VP8L":
        packed = little(body[1:5])
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF


def webp_chunk(kind: bytes, body: Bytes) -> bytes:
    return b"".join([kind, struct.pack("<I", len(body)), body, b"\0" * (len(body) % 2)])


def little(part: memoryview) -> int:
    return int.from_bytes(part, "little")


def orientation(exif: bytes) -> int:
    """The orientation in EXIF data, 1 to 8; 1 if it is missing or broken.

    Only this entry is read: a general reader copies the data of every entry, and thousands of entries may point at the
    same megabytes.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
