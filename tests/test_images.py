"""Images and masks of all kinds of files that users have, and broken files."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from corrmatch.data.images import DataError, is_image, read_ids, read_image, read_mask

ORIENTATION = 0x0112


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))


def exif(orientation):
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block


def seen(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
def test_images_and_masks_are_upright(tmp_path, image, orientation, kind):
    path = tmp_path / f"a.{kind}"
    image.save(path, exif=exif(orientation), **({"lossless": True} if kind == "webp" else {}))
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file)
    found = read_image(path)
    assert torch.equal(found, seen(upright))
    assert tuple(found.shape[1:]) == ((9, 6) if orientation > 4 else (6, 9))
    if kind == "webp":
        return
    ids = Image.fromarray(np.arange(54, dtype=np.uint8).reshape(6, 9))
    ids.save(tmp_path / f"m.{kind}", exif=exif(orientation))
    with Image.open(tmp_path / f"m.{kind}") as file:
        assert np.array_equal(read_ids(tmp_path / f"m.{kind}"), np.array(ImageOps.exif_transpose(file)))


def test_a_broken_exif_block_turns_nothing(tmp_path, image):
    for i, block in enumerate((b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09")):
        image.save(tmp_path / f"{i}.png", exif=block)
        assert torch.equal(read_image(tmp_path / f"{i}.png"), seen(image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_modes_of_eight_bits(tmp_path, image, mode):
    path = tmp_path / f"a.{'tif' if mode in ('CMYK', 'YCbCr') else 'png'}"
    image.convert(mode).save(path)
    with Image.open(path) as file:
        assert file.mode == mode
        assert torch.equal(read_image(path), seen(file))


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, kind):
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / f"a.{kind}")
    expected = torch.from_numpy((ramp >> 8).astype(np.uint8)).expand(3, -1, -1)
    assert torch.equal(read_image(tmp_path / f"a.{kind}"), expected)


def test_sixteen_bits_of_the_other_byte_order(tmp_path):
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.frombytes("I;16B", (8, 8), ramp.astype(">u2").tobytes()).save(tmp_path / "a.tif")
    assert torch.equal(read_image(tmp_path / "a.tif")[1], torch.from_numpy((ramp >> 8).astype(np.uint8)))


def test_sixteen_bits_of_colour_are_scaled_as_those_of_grey(tmp_path):
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in ramp)
    (tmp_path / "a.png").write_bytes(png(8, 8, 16, 2, rows))
    assert torch.equal(read_image(tmp_path / "a.png")[2], torch.from_numpy((ramp >> 8).astype(np.uint8)))


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_other_modes_are_refused_by_name(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=rf"a\.tif: expected an image of 8 or 16 bits, got one of mode {mode}$"):
        read_image(tmp_path / "a.tif")


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, color, rows, *more):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["grey", "palette"])
def test_masks_of_few_bits_keep_their_ids(tmp_path, depth, kind):
    ids = np.arange(16, dtype=np.uint8).reshape(2, 8) & (2**depth - 1)
    bits = np.unpackbits(ids[..., None], axis=2)[..., 8 - depth :].reshape(2, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in bits)
    colors = chunk(b"PLTE", bytes(3 * 2**depth))
    (tmp_path / "m.png").write_bytes(png(8, 2, depth, *((0, rows) if kind == "grey" else (3, rows, colors))))
    assert np.array_equal(read_ids(tmp_path / "m.png"), ids)
    table = torch.arange(255, -1, -1).to(torch.uint8)
    table[255 - 254] = 7
    assert torch.equal(read_mask(tmp_path / "m.png", table), table[torch.from_numpy(ids).long()])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16", "I", "F"])
def test_masks_of_other_modes_are_refused_by_name(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / "m.tif")
    with pytest.raises(DataError, match=rf"m\.tif: expected 8-bit class ids, got an image of mode {mode}"):
        read_ids(tmp_path / "m.tif")


def saved(image, kind, **more):
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def hostile(image):
    """Files on which readers raise unusual exceptions."""
    whole = {kind: saved(image.resize((90, 60)), kind) for kind in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "ICO")}
    files = {f"cut.{kind.lower()}": data[: len(data) // 3] for kind, data in whole.items()}
    files |= {f"head.{kind.lower()}": data[:9] for kind, data in whole.items()}
    files["empty.png"] = b""
    files["huge.png"] = png(20000, 20000, 1, 0, bytes(2501 * 10))
    files["wide.png"] = png(2**31 - 1, 2**31 - 1, 8, 2, b"")
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**27)))
    files["text.png"] = png(4, 4, 8, 0, bytes(20), text)
    files["short.png"] = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"\0\0\0\4")
    files["tags.tif"] = b"II*\0\x08\0\0\0\x01\0\0\x01\x03\0\xff\xff\xff\xff\0\0\0\0"
    files["size.pgm"] = b"P5 4 x 255 "
    files["none.pgm"] = b"P5 0 0 255 "
    files["text.jpg"] = b"not an image"
    files["program.png"] = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"  # for Ghostscript
    )
    return files


def test_every_failure_of_a_reader_is_a_line_that_names_the_file(tmp_path, image):
    for name, data in hostile(image).items():
        path = tmp_path / name
        path.write_bytes(data)
        for read, kind in ((read_image, "image"), (read_ids, "mask")):
            with pytest.raises(DataError) as caught:
                read(path)
            text = str(caught.value)
            assert text.startswith(f"{path}: not a readable {kind}: "), text
            assert "\n" not in text


def test_any_exception_of_a_reader_is_told(tmp_path, image, monkeypatch):
    image.save(tmp_path / "a.png")
    for error in (MemoryError(), struct.error("two\nlines"), KeyError(3), RecursionError("deep"), ZeroDivisionError()):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(Image.Image, "getexif", lambda self: {})
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
        with pytest.raises(DataError, match=r"a\.png: not a readable image: \S.*$"):
            read_image(tmp_path / "a.png")


def test_what_is_a_image_by_name():
    assert all(map(is_image, ("a.jpg", "a.JPEG", "a.png", "b.TIF", "a b.webp", "x.bmp", "a.b.gif")))
    assert not any(
        map(
            is_image,
            (".a.jpg", "._a.png", "Thumbs.db", "a.pdf", "a.h5", "a.eps", "a.mpg", "a.txt", "png", ".png", "a"),
        )
    )
