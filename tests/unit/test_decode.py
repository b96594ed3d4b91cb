"""Decoding: every common kind of image, as the field's loaders see it; bad ones by reason."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from preprocess import Rejected, decode_image
from preprocess.decode import naming
from preprocess.source import Entry, Source

GRADIENT = np.stack(np.broadcast_arrays(*np.ogrid[0:200:2, 0:240:2], 90), axis=-1).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def test_photographs_decode_as_pillow_decodes_them(photos):
    for path in photos[::16]:
        np.testing.assert_array_equal(decode_image(path.read_bytes()), pillow(path.read_bytes()))


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
        ("PNG", "1", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
        ("PPM", "RGB", {}),
    ],
)
def test_kinds_of_image(kind, mode, options):
    data = encoded(Image.fromarray(GRADIENT).convert(mode), kind, **options)
    pixels = decode_image(data)
    assert pixels.shape == GRADIENT.shape
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, pillow(data))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 120 * 100).reshape(100, 120).astype(np.uint16)
    pixels = decode_image(encoded(Image.fromarray(ramp), "PNG"))
    np.testing.assert_array_equal(pixels, np.repeat((ramp >> 8)[:, :, None], 3, axis=2))


def test_exif_orientation_is_ignored():
    plain = Image.fromarray(GRADIENT)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    rotated = encoded(plain, "JPEG", exif=exif)
    np.testing.assert_array_equal(decode_image(rotated), decode_image(encoded(plain, "JPEG")))


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(GRADIENT).convert("P"), Image.new("P", (120, 100), 3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(data), decode_image(encoded(frames[0], "GIF")))


def test_palette_with_transparency():
    image = Image.fromarray(GRADIENT).convert("P")
    pixels = decode_image(encoded(image, "PNG", transparency=bytes(range(256))))
    np.testing.assert_array_equal(pixels, np.array(image.convert("RGB")))


JPEG = encoded(Image.fromarray(GRADIENT), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not-an-image"),
        (
            b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
            "not-an-image",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not-an-image"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (JPEG[:-1], "truncated"),
        (JPEG[:-2], "truncated"),
        (encoded(Image.fromarray(GRADIENT), "PNG")[:-60], "truncated"),
        (encoded(Image.fromarray(np.arange(256, dtype=np.int32)[None]), "TIFF"), "not-an-image"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "not-an-image"),
    ],
)
def test_bad_bytes_are_rejected_with_their_reason(data, reason):
    with pytest.raises(Rejected) as caught:
        decode_image(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_no_truncation_gets_through_or_raises_anything_else(kind):
    whole = encoded(Image.fromarray(GRADIENT), kind)
    full = decode_image(whole)
    for cut in np.unique(np.linspace(0, len(whole) - 1, 60).astype(int)):
        try:
            pixels = decode_image(whole[:cut])
        except Rejected:
            continue
        np.testing.assert_array_equal(pixels, full)  # only padding or a trailer was cut


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_a_bomb_is_told_from_its_header(kind, monkeypatch):
    monkeypatch.setattr("preprocess.decode.MAX_PIXELS", 10_000)
    with pytest.raises(Rejected) as caught:
        decode_image(encoded(Image.fromarray(GRADIENT), kind))
    assert caught.value.reason == "too-large"


def test_a_png_of_absurd_dimensions_costs_nothing():
    data = bytearray(encoded(Image.fromarray(GRADIENT), "PNG"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(Rejected) as caught:
        decode_image(bytes(data))
    assert caught.value.reason == "too-large"


def test_a_file_that_changes_or_goes_is_rejected(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    entry = Entry("a.jpg", 0, len(JPEG))
    assert Source("folder", str(tmp_path), [], []).read(entry) == JPEG
    reasons = []
    for step in (
        lambda: (tmp_path / "a.jpg").write_bytes(JPEG[:-5]),
        lambda: (tmp_path / "a.jpg").write_bytes(JPEG + b"more"),
        lambda: (tmp_path / "a.jpg").unlink(),
        lambda: (tmp_path / "a.jpg").mkdir(),
    ):
        step()
        with pytest.raises(Rejected) as caught:
            Source("folder", str(tmp_path), [], []).read(entry)
        reasons.append(caught.value.reason)
    assert reasons == ["changed", "changed", "vanished", "unreadable"]


def test_what_libraries_print_has_the_name_of_the_input(capfd):
    with naming("a/b.tif"):
        os.write(2, b"bad tag\n\nworse tag\n")
    with naming("c.tif"):
        pass
    with naming("d.tif"):
        os.write(2, b"third")
    assert capfd.readouterr().err == "a/b.tif: bad tag\na/b.tif: worse tag\nd.tif: third\n"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_build_says_of_which_input_a_library_complains(jobs, small_source, tmp_path):
    path = small_source / "class0" / "000.jpg"
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes(30) + data[-2:])
    line = [sys.executable, "-m", "kamim", "shards", "build", small_source, tmp_path / "out"]
    line += ["--frame", 64, "--crop", 64, "--map-crops", 1, "--grid", 16, "--jobs", jobs]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if "Corrupt JPEG" in line]
    assert said
    assert all(line.startswith("class0/000.jpg: ") for line in said)
