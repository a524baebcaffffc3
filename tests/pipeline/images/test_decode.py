"""Every kind of image becomes 8-bit RGB, and every kind of rubbish a short reason."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from coldtap.errors import SourceError
from coldtap.pipeline.images.decode import BadImageError, content_digest, decode_rgb
from tests.helpers.pictures import encoded, picture


def pixels(raw):
    image = decode_rgb(raw)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_pixels_are_those_of_plain_convert(form, mode):
    raw = encoded(picture().convert(mode), form)
    with Image.open(io.BytesIO(raw)) as image:
        assert np.array_equal(pixels(raw), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette_is_looked_up(form):
    image = picture().convert("P")
    assert np.array_equal(pixels(encoded(image, form)), np.asarray(image.convert("RGB")))


def test_one_bit_image_is_black_and_white():
    image = Image.fromarray(np.array([[True, False]]))
    assert pixels(encoded(image)).tolist() == [[[255] * 3, [0] * 3]]


def test_cmyk_jpeg_is_converted():
    raw = encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG")
    assert np.allclose(pixels(raw), [255, 0, 0], atol=3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped_not_composited(mode):
    image = Image.new("RGBA", (2, 2), (200, 200, 200, 0)).convert(mode)
    assert (pixels(encoded(image)) == 200).all()


def test_palette_with_transparency_is_dropped_without_a_warning():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    raw = encoded(image, transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (pixels(raw) == [10, 20, 30]).all()


def test_palette_image_of_the_caller_is_left_as_it_was():
    image = Image.new("P", (2, 2), 1)
    image.info["transparency"] = bytes([0, 128])
    decode_rgb(image)
    assert image.info["transparency"] == bytes([0, 128])


def png(header, scanlines):
    """Return a PNG of its parts; Pillow writes none of 16-bit RGB, nor one that lies about its size."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    body = chunk(b"IDAT", zlib.compress(scanlines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(form):
    grey = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(grey), form))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_sixteen_bit_pgm_is_scaled():
    raw = b"P5 3 1 65535\n" + np.array([0, 32768, 65535], dtype=">u2").tobytes()
    assert pixels(raw)[0, :, 0].tolist() == [0, 128, 255]


def test_sixteen_bit_grey_equals_sixteen_bit_rgb_of_the_same_values():
    values = np.array([0, 300, 32768, 65000], dtype=">u2")
    rgb = png(struct.pack(">IIBBBBB", 4, 1, 16, 2, 0, 0, 0), b"\0" + values.repeat(3).tobytes())
    assert np.array_equal(pixels(rgb), pixels(values.astype(np.uint16)[None]))


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    raw = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(raw) == [255, 0, 0]).all()


def test_exif_orientation_is_ignored():
    image = picture(width=6, height=4)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert pixels(encoded(image, exif=exif.tobytes())).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "^empty: 0 bytes$"),
        (encoded(picture(), "EPS"), r"^not an image: starts with b'%!PS-Ado'$"),
        (b"hello, world", r"^not an image: starts with b'hello, w'$"),
        (encoded(picture(), "JPEG")[:10], "^truncated: 10 bytes of a JPEG$"),
        (encoded(picture())[:10], r"^not an image: starts with b'\\x89PNG"),
        (encoded(picture(0, 64, 64), "JPEG")[:1203], "^truncated: 1203 bytes of a JPEG$"),
        (encoded(picture(0, 64, 64), "JPEG")[:200], "^truncated: 200 bytes of a JPEG$"),
        (encoded(picture(0, 64, 64))[:5000], "^truncated: 5000 bytes of a PNG$"),
        (encoded(picture(0, 64, 64), "GIF")[:1500], "^truncated: 1500 bytes of a GIF$"),
        (encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"), "^32-bit float pixels"),
        (encoded(Image.fromarray(np.array([[-1, 70000]], np.int32)), "TIFF"), "integer pixels from -1 to 70000"),
        (Image.open(io.BytesIO(encoded(picture(0, 64, 64), "JPEG")[:1203])), "^broken JPEG: image file is trunc"),
    ],
)
def test_bad_image_has_a_short_reason(raw, reason):
    with pytest.raises(BadImageError, match=reason):
        decode_rgb(raw)


def reason_against(raw):
    try:
        decode_rgb(raw)
    except BadImageError as error:
        return str(error)
    return ""


def test_flipped_bytes_are_a_bad_image_or_an_image_and_nothing_else():
    rng = np.random.default_rng(0)
    for form in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = np.frombuffer(encoded(picture(0, 16, 16), form), dtype=np.uint8)
        for _ in range(40):
            broken = whole.copy()
            broken[rng.integers(0, len(broken), 4)] = rng.integers(0, 256, 4)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow grumbles about odd metadata
                reason = reason_against(broken.tobytes())
            assert "\n" not in reason
            assert len(reason) < 250


def png_of_size(width, height):
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"far too little")


@pytest.mark.parametrize("size", [(30000, 30000), (10000, 10000)])
def test_decompression_bomb_is_refused_by_its_header(size):
    with pytest.raises(BadImageError, match=r"^decompression bomb: .*pixels"):
        decode_rgb(png_of_size(*size))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_image_that_pillow_only_warns_of_is_refused_too():
    with pytest.raises(BadImageError, match=r"^decompression bomb: 10000 x 10000 pixels, more than"):
        decode_rgb(png_of_size(10000, 10000))


def test_bad_image_is_a_source_error():
    assert issubclass(BadImageError, SourceError)


CHANNELS_LAST = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "raw",
    [
        CHANNELS_LAST,
        CHANNELS_LAST.transpose(2, 0, 1),
        torch.from_numpy(CHANNELS_LAST),
        torch.from_numpy(CHANNELS_LAST).permute(2, 0, 1),
        torch.from_numpy(CHANNELS_LAST).permute(2, 0, 1) / 255,
        CHANNELS_LAST / 255,
        CHANNELS_LAST.astype(np.uint16) * 257,
        np.concatenate([CHANNELS_LAST, CHANNELS_LAST[:, :, :1]], axis=2),
        Image.fromarray(CHANNELS_LAST),
    ],
)
def test_arrays_and_tensors_in_either_order(raw):
    assert np.array_equal(pixels(raw), CHANNELS_LAST)


def test_grey_arrays_and_ambiguous_orders():
    grey = CHANNELS_LAST[:, :, 0]
    assert np.array_equal(pixels(grey), grey[:, :, None].repeat(3, axis=2))
    assert np.array_equal(pixels(grey > 128), (grey > 128)[:, :, None].repeat(3, axis=2) * np.uint8(255))
    both = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3)
    assert np.array_equal(pixels(both), both)
    assert np.array_equal(pixels(torch.from_numpy(both)), both.transpose(1, 2, 0))


def test_bfloat16_tensor():
    assert (pixels(torch.ones(3, 2, 2, dtype=torch.bfloat16)) == 255).all()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (np.zeros((0, 3, 3), np.uint8), r"^empty: shape \(0, 3, 3\)$"),
        (np.zeros((5, 6, 7), np.uint8), r"^not an image: shape \(5, 6, 7\)"),
        (np.zeros(5, np.uint8), r"^not an image: shape \(5,\)"),
        (np.zeros((5, 6, 3), np.int64), "^pixels of type int64"),
        (np.full((5, 6, 3), 200.0), "^float pixels from 200 to 200"),
        (np.full((5, 6, 3), np.nan), "^float pixels from nan to nan"),
        (torch.full((3, 5, 6), -0.5), "^float pixels from -0.5 to -0.5"),
    ],
)
def test_bad_array_has_a_short_reason(raw, reason):
    with pytest.raises(BadImageError, match=reason):
        decode_rgb(raw)


def test_array_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(BadImageError, match=r"^decompression bomb: 7 x 5 pixels, more than .* = 20"):
        decode_rgb(CHANNELS_LAST)


def test_threads_get_the_same_pixels():
    raws = [encoded(picture(seed, 16, 16), form) for seed in range(10) for form in ("PNG", "JPEG", "GIF", "TIFF")]
    alone = [pixels(raw) for raw in raws]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            together = list(pool.map(pixels, raws))
            assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_content_digest_knows_bytes_pixels_shape_and_type():
    image = picture()
    array = np.asarray(image)
    distinct = [
        encoded(image),
        image,
        image.convert("P"),
        picture(1),
        array,
        array.astype(np.uint16),
        array.reshape(4, 16, 3),
    ]
    digests = {content_digest(raw) for raw in distinct}
    assert len(digests) == len(distinct)
    assert all(len(digest) == 64 for digest in digests)
    assert content_digest(array) == content_digest(array.copy()) == content_digest(torch.from_numpy(array.copy()))
    # SHA-256 of "abc", from FIPS 180-2.
    assert content_digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_palette_counts_for_the_digest():
    one, other = Image.new("P", (2, 2)), Image.new("P", (2, 2))
    one.putpalette([1, 2, 3])
    other.putpalette([3, 2, 1])
    assert content_digest(one) != content_digest(other)
