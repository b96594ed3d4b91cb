"""Damaged images made from real ones, kind by kind.

Each is (file name suffix, bytes).
"""

import io
import random
import struct
import zlib
from collections.abc import Callable

from PIL import Image

Photos = list[bytes]
Bad = tuple[str, bytes]
SUFFIX = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
}
MAGIC = (
    b"\xff\xd8\xff\xe0",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF\x24\0\0\0WEBPVP8 ",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"P6\n",
    b"%!PS-Adobe",
    b"%PDF-1.4\n",
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"\x7fELF",
    b"<svg",
    b"<!doctype html>",
    b"\0\0\0\x0cjP  ",
    b"qoif",
    b"\0" * 16,
)


def encoded(rng: random.Random, photos: Photos) -> tuple[str, bytes]:
    """A sound image of any format: (format, file)."""
    data = rng.choice(photos)
    name = rng.choice(["JPEG", "JPEG", "JPEG", *SUFFIX])
    if name == "JPEG" and rng.random() < 0.7:
        return name, data
    image = Image.open(io.BytesIO(data)).convert(rng.choice(["RGB", "RGB", "L"]))
    image.thumbnail((200, 200))
    options: dict[str, object] = {}
    if name == "JPEG":
        options = {"progressive": rng.random() < 0.5, "quality": rng.randint(1, 100)}
    if name == "TIFF":
        options = {"compression": rng.choice(["raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg"])}
    if name == "PNG" and rng.random() < 0.3:
        image = image.convert("P")
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return name, buffer.getvalue()


def boundaries(data: bytes) -> list[int]:
    """Places where a part of a file may begin or end: JPEG markers, PNG and RIFF chunks."""
    found = {0, 1, 2, 3, 4, 8, 12, 26, len(data) - 1, len(data) - 2}
    if data[:2] == b"\xff\xd8":
        at = 2
        while at + 4 <= len(data) and data[at] == 0xFF:
            size = int.from_bytes(data[at + 2 : at + 4], "big")
            found |= {at, at + 1, at + 2, at + 4, at + 2 + size}
            at += 2 + size
    if data[:4] == b"\x89PNG":
        at = 8
        while at + 8 <= len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            found |= {at, at + 4, at + 8, at + 8 + size}
            at += 12 + size
    return sorted(place for place in found if 0 <= place < len(data))


def truncated(rng: random.Random, photos: Photos) -> Bad:
    """Cut at a boundary, a byte beside one, or anywhere."""
    name, data = encoded(rng, photos)
    place = rng.choice(boundaries(data)) + rng.choice([-1, 0, 0, 1])
    if rng.random() < 0.4:
        place = rng.randrange(len(data))
    return SUFFIX[name], data[: max(0, place)]


def flipped(rng: random.Random, photos: Photos) -> Bad:
    """1 to 64 bits flipped, anywhere."""
    name, data = encoded(rng, photos)
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return SUFFIX[name], bytes(out)


def header_flipped(rng: random.Random, photos: Photos) -> Bad:
    """Bytes of the first hundred replaced."""
    name, data = encoded(rng, photos)
    out = bytearray(data)
    for _ in range(rng.choice([1, 2, 4])):
        out[rng.randrange(min(100, len(out)))] = rng.choice([0, 1, 127, 128, 255])
    return SUFFIX[name], bytes(out)


def spliced(rng: random.Random, photos: Photos) -> Bad:
    """The beginning of one file and the end of another."""
    (name, head), (_, tail) = encoded(rng, photos), encoded(rng, photos)
    cut = rng.choice(boundaries(head)) if rng.random() < 0.6 else rng.randrange(len(head))
    return SUFFIX[name], head[:cut] + tail[rng.randrange(len(tail)) :]


def misnamed(rng: random.Random, photos: Photos) -> Bad:
    """A sound image under another format's name, or something that is no image at all."""
    wrong = rng.choice(list(SUFFIX.values()))
    if rng.random() < 0.5:
        return wrong, encoded(rng, photos)[1]
    return wrong, rng.choice(MAGIC) + rng.randbytes(rng.randrange(2000))


def absurd(rng: random.Random, photos: Photos) -> Bad:
    """Dimensions in the header that the data do not have."""
    name, data = encoded(rng, photos)
    out = bytearray(data)
    wide = rng.choice([0, 1, 65535, 65500, 2**31 - 1, 2**32 - 1, 99_999])
    high = rng.choice([0, 1, 65535, 2**31 - 1, 2**32 - 1, 1001])
    if name == "PNG":
        out[16:24] = struct.pack(">II", wide & 0xFFFFFFFF, high & 0xFFFFFFFF)
        out[29:33] = struct.pack(">I", zlib.crc32(bytes(out[12:29])))
    elif name == "BMP":
        out[18:26] = struct.pack("<II", wide & 0xFFFFFFFF, high & 0xFFFFFFFF)
    elif name == "GIF":
        out[6:10] = struct.pack("<HH", wide & 0xFFFF, high & 0xFFFF)
    elif name == "PPM":
        return "ppm", b"P6\n%d %d\n255\n" % (wide, high) + data[20:]
    else:
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        if at > 0:
            out[at + 5 : at + 9] = struct.pack(">HH", high & 0xFFFF, wide & 0xFFFF)
    return SUFFIX[name], bytes(out)


def png(width: int, height: int, depth: int = 8, extra: bytes = b"", colour: int = 0) -> bytes:
    """A PNG of zeros, compressed a thousandfold; `extra` chunks stand before its data."""
    samples = {0: 1, 2: 3}[colour]
    row = 1 + (width * depth * samples + 7) // 8
    packer, parts = zlib.compressobj(9), []
    for _ in range(height):
        parts.append(packer.compress(bytes(row)))
    parts.append(packer.flush())
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", b"".join(parts)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def bomb(rng: random.Random, photos: Photos) -> Bad:
    """Small files that unpack into something huge, or that refer to something."""
    packed = zlib.compress(bytes(200_000_000), 9)
    buffer = io.BytesIO()
    frames = [Image.new("L", (64, 64), n % 256) for n in range(300)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    laugh = b'<!DOCTYPE svg [<!ENTITY a "ha">' + b"".join(
        b'<!ENTITY a%d "%s">' % (n, b"&a%d;" % (n - 1) * 10 if n > 1 else b"&a;" * 10)
        for n in range(1, 12)
    )
    laugh += b"]><svg xmlns='http://www.w3.org/2000/svg'><text>&a11;</text></svg>"
    fetch = b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
    archive = b"PK\x03\x04\x14\0\0\0\x08\0" + bytes(16) + b"\x01\0\0\0a" + packed
    kinds: list[Callable[[], Bad]] = [
        lambda: ("png", png(30_000, 30_000, depth=1)),  # 900 million pixels in 0.1 MB
        lambda: ("png", png(9_990, 9_990)),  # just within the limit
        lambda: ("png", png(9_990, 9_990, depth=16, colour=0)),
        lambda: ("png", png(64, 64, extra=chunk(b"zTXt", b"a\0\0" + packed))),
        lambda: ("png", png(64, 64, extra=chunk(b"iCCP", b"a\0\0" + packed))),
        lambda: ("gif", buffer.getvalue()),
        lambda: ("jpg", archive),
        lambda: ("png", archive),
        lambda: ("jpg", laugh),
        lambda: ("png", fetch),
    ]
    return rng.choice(kinds)()


def extreme(rng: random.Random, photos: Photos) -> Bad:
    """Sound images of shapes that nobody expects."""
    shapes = [
        (1, 10_000),
        (10_000, 1),
        (1, 1),
        (2, 1),
        (1, 65_500),
        (65_500, 1),
        (3, 9_999),
        (7, 7),
    ]
    name = rng.choice(["JPEG", "PNG", "BMP", "TIFF"])
    buffer = io.BytesIO()
    Image.open(io.BytesIO(rng.choice(photos))).convert("RGB").resize(rng.choice(shapes)).save(
        buffer, name
    )
    return SUFFIX[name], buffer.getvalue()


def empty(rng: random.Random, photos: Photos) -> Bad:
    """Nothing, or next to it."""
    suffix = rng.choice(list(SUFFIX.values()))
    few = [b"", b"", b"\0", b"\xff\xd8\xff", b"\n" * 100, rng.choice(MAGIC)]
    return suffix, rng.choice(few)


# Kind, how many at scale 1, and whether every one of them is a sound image.
KINDS: dict[str, tuple[Callable[[random.Random, Photos], Bad], int, bool]] = {
    "truncated": (truncated, 700, False),
    "bits flipped": (flipped, 700, False),
    "headers changed": (header_flipped, 200, False),
    "spliced": (spliced, 200, False),
    "misnamed": (misnamed, 140, False),
    "absurd dimensions": (absurd, 140, False),
    "bombs": (bomb, 24, False),
    "1 x 10,000 px and the like": (extreme, 40, True),
    "empty": (empty, 30, False),
}
