"""Images to the pixels that a backbone expects, as timm's evaluation transform makes them, and seeded views.

An image is resized and cropped to 8-bit pixels in a thread; whole batches are made floating point and normalised
on the device (`backbones/inputs.py`), where four times fewer bytes have to be sent. Nothing here needs torch or timm.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image

from coldtap.errors import ModelError, OptionError
from coldtap.pipeline.images.decode import BadImageError
from coldtap.pipeline.images.resize import RESAMPLING, resize_and_crop

CROP_MODES = ("center", "squash", "border")
INTERPOLATIONS = tuple(RESAMPLING)
OVERRIDES = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
N_CHANNELS = 3
N_ATTEMPTS = 10  # as torchvision's RandomResizedCrop


class _Values:
    """A frozen dataclass that goes into JSON and comes back."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` takes, fit for JSON."""
        values = asdict(self)  # type: ignore[call-overload] # subclasses are dataclasses
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return what `to_dict` was called on.

        Raises:
            OptionError: a key is unknown or missing, or a value cannot be used.
        """
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        if wrong := sorted(set(values) ^ set(known)):
            raise OptionError(f"{cls.__name__}: unknown or missing {', '.join(wrong)}; known: {', '.join(known)}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation(_Values):
    """How views 1 … V differ from view 0: a random resized crop and a horizontal flip, with torchvision's defaults.

    Attributes:
        crop_scale: least and greatest area of the crop, as a fraction of the image.
        crop_ratio: least and greatest width / height of the crop.
        flip: probability of a horizontal flip.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        low, high = _numbers("crop_scale", self.crop_scale, 2)
        if not 0 < low <= high <= 1:
            raise OptionError(f"crop_scale={self.crop_scale}: wanted 0 < least <= greatest <= 1")
        low, high = _numbers("crop_ratio", self.crop_ratio, 2)
        if not 0 < low <= high:
            raise OptionError(f"crop_ratio={self.crop_ratio}: wanted 0 < least <= greatest")
        if not 0 <= self.flip <= 1:
            raise OptionError(f"flip={self.flip}: wanted a probability")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess(_Values):
    """How an image becomes the input of a backbone: timm's evaluation transform.

    Attributes:
        height, width: of the input, in pixels.
        crop_pct: size of the crop over size of the resized image.
        crop_mode: 'center' resizes the shorter edge, 'squash' both edges, 'border' the longer edge and pads.
        interpolation: of the resizing, one of `INTERPOLATIONS`.
        mean, std: of each channel, on a scale of 0 … 1.
    """

    height: int
    width: int
    crop_pct: float
    crop_mode: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise OptionError(f"{name}={size!r}: wanted a number of pixels")
        if not self.crop_pct > 0:
            raise OptionError(f"crop_pct={self.crop_pct}: wanted a number above 0")
        if self.crop_mode not in CROP_MODES:  # timm takes any other word for 'center'
            raise OptionError(f"crop_mode={self.crop_mode!r}: wanted one of {', '.join(CROP_MODES)}")
        if self.interpolation not in INTERPOLATIONS:
            raise OptionError(f"interpolation={self.interpolation!r}: wanted one of {', '.join(INTERPOLATIONS)}")
        _numbers("mean", self.mean, N_CHANNELS)
        if not all(std > 0 for std in _numbers("std", self.std, N_CHANNELS)):
            raise OptionError(f"std={self.std}: wanted numbers above 0")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Self:
        """Return what a data configuration in timm's words says, with parts replaced.

        Args:
            config: all of `OVERRIDES`; other keys are ignored.
            overrides: any of them; input_size is a side, (height, width) or (channel, height, width). None leaves a
                part as it is.

        Raises:
            OptionError: an override is unknown or cannot be used.
            ModelError: the configuration does not ask for three channels.
        """
        replaced = {key: value for key, value in (overrides or {}).items() if value is not None}
        if unknown := [key for key in replaced if key not in OVERRIDES]:
            raise OptionError(f"unknown preprocessing {', '.join(unknown)}; known: {', '.join(OVERRIDES)}")
        config = {**config, **replaced}
        channels, height, width = _input_size(config["input_size"])
        if channels != N_CHANNELS:
            raise ModelError(f"the model takes {channels} channels; images are decoded to {N_CHANNELS} (RGB)")
        return cls(
            height=height,
            width=width,
            crop_pct=float(config["crop_pct"]),
            crop_mode=config["crop_mode"],
            interpolation=config["interpolation"],
            mean=_numbers("mean", config["mean"], N_CHANNELS),
            std=_numbers("std", config["std"], N_CHANNELS),
        )

    def pixels(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resize and crop an RGB image.

        Returns:
            Shape (channel, height, width).

        Raises:
            BadImageError: the image is so narrow that resizing it would fill the memory, or leave nothing.
        """
        self._refuse_narrow(image)
        view = resize_and_crop(
            image,
            (self.height, self.width),
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            interpolation=self.interpolation,
            border=self.mean,
        )
        return np.asarray(view).transpose(2, 0, 1)

    def augmented(
        self, image: Image.Image, *, seed: int, sample_id: str, view: int, augmentation: Augmentation
    ) -> npt.NDArray[np.uint8]:
        """Crop, resize and flip an RGB image at random: a pure function of its arguments.

        torchvision's own transforms draw from one generator that all threads share, so the same view would
        depend on what other threads do. Here each draw is a part of SHAKE-256 over (seed, view, id).

        Args:
            image: of any size.
            seed: of the whole run.
            sample_id: as in the listing.
            view: 1 … V; view 0 is `pixels`.
            augmentation: what is drawn.

        Returns:
            Shape (channel, height, width).
        """
        flip, *draws = _draws(seed, sample_id, view)
        box = _crop_box(image.width, image.height, draws, augmentation)
        # Crop before resizing, as torchvision: resize(box=...) would let pixels outside the crop in.
        view_image = image.crop(box).resize((self.width, self.height), RESAMPLING[self.interpolation])
        if flip < augmentation.flip:
            view_image = view_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(view_image).transpose(2, 0, 1)

    def _refuse_narrow(self, image: Image.Image) -> None:
        height, width = image.height, image.width
        scales = (math.floor(self.height / self.crop_pct) / height, math.floor(self.width / self.crop_pct) / width)
        limit = Image.MAX_IMAGE_PIXELS
        # 1 x 20000 pixels pass for a small image, until the shorter edge is made 224.
        too_large = self.crop_mode == "center" and height * width * max(scales) ** 2 > (limit or math.inf)
        too_small = self.crop_mode == "border" and min(height, width) * min(scales) <= 0.5
        if too_large or too_small:
            raise BadImageError(
                f"too narrow: {width} x {height} pixels cannot be resized to {self.width} x {self.height}"
            )


def _draws(seed: int, sample_id: str, view: int) -> list[float]:
    """Return numbers in [0, 1): flip, top, left, and two for each attempt at a crop.

    Hashed, not drawn from NumPy's Generator, whose stream may change with its version: a store that is resumed
    after an upgrade must get the same bytes.
    """
    count = 3 + 2 * N_ATTEMPTS
    stream = hashlib.shake_256(f"{seed}\0{view}\0{sample_id}".encode()).digest(8 * count)
    draws: list[float] = ((np.frombuffer(stream, dtype="<u8") >> np.uint64(11)) * 2.0**-53).tolist()
    return draws


def _crop_box(width: int, height: int, draws: list[float], augmentation: Augmentation) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) as torchvision's RandomResizedCrop.get_params defines it."""
    (least_scale, most_scale), (least, most) = augmentation.crop_scale, augmentation.crop_ratio
    for area_draw, ratio_draw in zip(draws[2::2], draws[3::2], strict=True):
        area = width * height * (least_scale + (most_scale - least_scale) * area_draw)
        ratio = math.exp(math.log(least) + (math.log(most) - math.log(least)) * ratio_draw)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = math.floor(draws[0] * (height - crop_height + 1))
            left = math.floor(draws[1] * (width - crop_width + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width, crop_height = width, height
    if width / height < least:
        crop_height = max(1, round(width / least))
    elif width / height > most:
        crop_width = max(1, round(height * most))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _numbers(name: str, values: Any, count: int) -> tuple[float, ...]:
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        found = ()
    if len(found) != count or not all(math.isfinite(value) for value in found):
        raise OptionError(f"{name}={values!r}: wanted {count} numbers")
    return found


def _input_size(size: Any) -> tuple[int, int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, (tuple, list)) else ()
    if len(sides) not in (2, 3) or not all(isinstance(side, int) for side in sides):
        raise OptionError(f"input_size={size!r}: wanted SIDE, (height, width) or (channel, height, width)")
    channels, height, width = sides if len(sides) == 3 else (N_CHANNELS, *sides)
    return channels, height, width
