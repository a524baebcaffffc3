"""What a plan has to know of a backbone: values alone, so that a machine without torch can plan too."""

from collections.abc import Mapping
from dataclasses import dataclass

from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.pipeline.plan.options import Precision
from coldtap.stores.format.extractor import ExtractorPart, Tap
from coldtap.stores.format.geometry import Geometry
from coldtap.stores.format.norm import FinalNorm


@dataclass(frozen=True, kw_only=True)
class BackboneDescription:
    """A frozen backbone in words and numbers.

    Attributes:
        architecture: timm's name without a pretrained tag, or the class of a module from Python.
        weights: SHA-256 of the float32 weights.
        precision: dtype of weights and activations.
        preprocess: how an image becomes its input.
        tap_names: the name of each tap, by index.
        geometries: the geometry of each tap, by index.
        stages: the taps are feature maps of stages, not the residual stream z0 … zN.
        norm: the final norm, as data.
        quantisation: what the recipe says of a quantised backbone's artefact; None of a float one.
    """

    architecture: str
    weights: str
    precision: Precision
    preprocess: Preprocess
    tap_names: tuple[str, ...]
    geometries: Mapping[int, Geometry]
    stages: bool
    norm: FinalNorm | None
    quantisation: Mapping[str, str] | None = None

    @property
    def depth(self) -> int:
        """N, the index of the last tap."""
        return len(self.geometries) - 1

    @property
    def one_stream(self) -> bool:
        """Whether the taps are one stream of tokens that every block adds to; without it a sum means nothing."""
        return not self.stages and len(set(self.geometries.values())) == 1

    def extractor(self) -> ExtractorPart:
        """Return the extractor part of a recipe: all that decides what a tap's numbers mean."""
        return ExtractorPart(
            architecture=self.architecture,
            weights=self.weights,
            quantisation=self.quantisation and dict(self.quantisation),
            precision=self.precision,
            preprocess=self.preprocess.to_dict(),
            taps=tuple(Tap(name=self.tap_names[i], geometry=geometry) for i, geometry in self.geometries.items()),
        )
