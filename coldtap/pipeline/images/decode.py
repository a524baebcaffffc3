"""Raw images in, 8-bit RGB out.

The pixels are those that `PIL.Image.open(file).convert("RGB")`, and so timm and torchvision, would give:
transparency is dropped, not composited; an animation gives its first frame; EXIF orientation and ICC profiles
are ignored. One difference is on purpose: 16-bit grey is scaled to 8 bits, where Pillow clips everything above
255 to white.

Everything here may be called from many threads at once.
"""

import hashlib
import io
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from coldtap.errors import SourceError

if TYPE_CHECKING:
    import torch

type RawImage = bytes | Image.Image | npt.NDArray[Any] | torch.Tensor
"""The bytes of an encoded image file, or an image that Python code has already decoded."""

# Not all that Pillow knows: it hands EPS, for one, to Ghostscript, whatever the file is called.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
CHANNEL_COUNTS = (1, 3, 4)


class BadImageError(SourceError):
    """One image cannot be used; `str(error)` is a short lower-case reason, fit for a table."""


def is_raw_image(value: object) -> TypeGuard[RawImage]:
    """Return whether a value is of a type that `decode_rgb` takes."""
    torch = sys.modules.get("torch")  # where nobody has imported it, nothing is a tensor
    return isinstance(value, (bytes, Image.Image, np.ndarray)) or (
        torch is not None and isinstance(value, torch.Tensor)
    )


def decode_rgb(raw: RawImage) -> Image.Image:
    """Decode one image to 8-bit RGB.

    Args:
        raw: encoded bytes, a PIL image, or an array or tensor of shape (height, width),
            (height, width, channel) or (channel, height, width) with 1, 3 or 4 channels. Where both orders
            would fit, an array is read as (height, width, channel) and a tensor as (channel, height, width).
            uint8 spans 0 … 255, uint16 0 … 65535, bool and floating point 0 … 1.

    Raises:
        BadImageError: the image is empty, truncated, broken, not an image, or a decompression bomb.
    """
    if not isinstance(raw, (bytes, Image.Image)):
        return _image_of_array(raw)
    image = raw if isinstance(raw, Image.Image) else _open(raw)
    _refuse_bomb(image)
    try:
        image.load()
        return _to_rgb(image)
    except (BadImageError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on malformed bytes
        raise BadImageError(_broken(raw, image.format, error)) from error


def content_digest(raw: RawImage) -> str:
    """Return the SHA-256 of the encoded bytes, or of type, shape and pixels where an image is in memory."""
    if isinstance(raw, bytes):
        return hashlib.sha256(raw).hexdigest()
    if isinstance(raw, Image.Image):
        palette = raw.palette.tobytes() if raw.palette else b""
        head, pixels = f"{raw.mode}{raw.size}", palette + raw.tobytes()
    else:
        array = _array(raw)
        head, pixels = f"{array.dtype.str}{array.shape}", array.tobytes()
    return hashlib.sha256(head.encode() + pixels).hexdigest()


def _open(encoded: bytes) -> Image.Image:
    if not encoded:
        raise BadImageError("empty: 0 bytes")
    try:
        return Image.open(io.BytesIO(encoded), formats=_formats())
    except UnidentifiedImageError as error:
        raise BadImageError(f"not an image: starts with {encoded[:8]!r}") from error
    # Pillow only warns between one and two times its limit. Where warnings are errors, that raises too.
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(f"decompression bomb: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise BadImageError(_broken(encoded, None, error)) from error


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(form for form in FORMATS if form in Image.OPEN)  # Pillow learnt AVIF in 11.3


def _refuse_bomb(image: Image.Image) -> None:
    # The size stands in the header, so nothing has been decoded yet. Pillow's own warning is no help here:
    # turning warnings into errors changes state that all threads share.
    limit = Image.MAX_IMAGE_PIXELS
    width, height = image.size
    if limit is not None and width * height > limit:
        raise BadImageError(
            f"decompression bomb: {width} x {height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS = {limit}"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in SIXTEEN_BIT_MODES or image.mode == "I":
        return _image_of_array(_sixteen_bit(image))
    if image.mode == "F":
        raise BadImageError("32-bit float pixels: black and white are not defined")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.copy()  # the caller may own it
        del image.info["transparency"]  # Pillow would warn, then drop it all the same
    return image.convert("RGB")


def _sixteen_bit(image: Image.Image) -> npt.NDArray[np.uint16]:
    pixels = np.asarray(image)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:  # mode I holds 16-bit grey (PGM), but also any 32-bit integer (TIFF)
        raise BadImageError(f"32-bit integer pixels from {low} to {high}: black and white are not defined")
    return pixels.astype(np.uint16)


def _broken(raw: RawImage, form: str | None, error: Exception) -> str:
    encoded = raw if isinstance(raw, bytes) else b""
    form = form or ("JPEG" if encoded.startswith(b"\xff\xd8") else "image")
    if encoded and "truncated" in str(error).lower():
        return f"truncated: {len(encoded)} bytes of a {form}"
    return f"broken {form}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words[:1].lower() + words[1:120]


def _array(raw: "npt.NDArray[Any] | torch.Tensor") -> npt.NDArray[Any]:
    if isinstance(raw, np.ndarray):
        return raw
    tensor = raw.detach().cpu()
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()  # NumPy has no bfloat16


def _image_of_array(raw: "npt.NDArray[Any] | torch.Tensor") -> Image.Image:
    pixels = _eight_bit(_channels_last(_array(raw), channels_first=not isinstance(raw, np.ndarray)))
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))
    _refuse_bomb(image)
    return image


def _channels_last(array: npt.NDArray[Any], *, channels_first: bool) -> npt.NDArray[Any]:
    """Return a view of shape (height, width, channel)."""
    if array.size == 0:
        raise BadImageError(f"empty: shape {array.shape}")
    if array.ndim == 2:
        return array[:, :, None]
    axes = (0, 2) if channels_first else (2, 0)
    axis = next((axis for axis in axes if array.ndim == 3 and array.shape[axis] in CHANNEL_COUNTS), None)
    if axis is None:
        raise BadImageError(f"not an image: shape {array.shape}, wanted 1, 3 or 4 channels first or last")
    return array.transpose(1, 2, 0) if axis == 0 else array


def _eight_bit(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        # The high byte, because that is how Pillow reads 16-bit RGB: grey kept as RGB gives the same pixels.
        return (array >> 8).astype(np.uint8)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if not np.issubdtype(array.dtype, np.floating):
        raise BadImageError(f"pixels of type {array.dtype}: wanted uint8, uint16, bool or floating point")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):  # false for NaN too
        raise BadImageError(f"float pixels from {low:g} to {high:g}: wanted 0 to 1")
    return np.rint(array * 255.0).astype(np.uint8)
