"""Backbone and adaptor joined: images in, labels out, without a store."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from coldtap.adaptors import RunInfo, load_adaptor
from coldtap.adaptors.runs.run_folder import RUN
from coldtap.errors import ModelError, OptionError
from coldtap.pipeline.backbones.backbone import Backbone, load_backbone
from coldtap.pipeline.backbones.integer.artefact import read_artefact
from coldtap.pipeline.backbones.weights import cached_weights, require_no_place
from coldtap.pipeline.extract.gather import gather
from coldtap.pipeline.images.decode_ahead import Decoder, Sample
from coldtap.pipeline.images.preprocess import Preprocess
from coldtap.pipeline.images.sources import Listing, Source
from coldtap.stores.format.gathers import GATHERS
from coldtap.stores.format.recipe import differing_fields

N_DECODE_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is said of one image: a class, or any number of labels, ascending; each with its probability."""

    labels: tuple[int, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A trained adaptor on the backbone that it was trained on."""

    backbone: Backbone
    adaptor: nn.Module
    info: RunInfo

    @classmethod
    def load(
        cls,
        run: Path,
        *,
        adaptor: str | None,
        model: str | None,
        checkpoint: Path | None,
        random_weights: bool,
        quantised: Path | None,
        device: str,
    ) -> "Predictor":
        """Load a finished run, with the compensation that it may have, and its backbone.

        Raises:
            RunError: the run cannot be read.
            ModelError: the backbone cannot be had, or its extractor is not the run's.
            OptionError: the run answers for each token, not for an image, or is of another adaptor.
        """
        module, info = load_adaptor(run, adaptor=adaptor)
        if info.target_kind == "token-class":
            raise OptionError(
                f"{run} answers for each token of an image, and predict writes one line per image: use load_adaptor "
                "in Python"
            )
        extractor = info.extractor
        _require_artefact(run, extractor.get("quantisation"), quantised)
        if model is None and quantised is None:
            model, where = info.model, str(run / RUN)
            require_no_place(model, where)
            if checkpoint is None and not random_weights:
                checkpoint = cached_weights(model, where)
        backbone = load_backbone(
            model,
            quantised=quantised,
            checkpoint=checkpoint,
            random_weights=random_weights,
            precision=extractor["precision"],
            device=device,
            preprocess=Preprocess.from_dict(extractor["preprocess"]),
        )
        if backbone.extractor().digest != info.extractor_digest:
            fields = differing_fields(extractor, backbone.extractor().to_dict())
            raise ModelError(
                f"{run} was trained on features of another extractor; give the `model`, `checkpoint` or `quantized` it "
                f"was made with. Fields that differ (trained on → given): {'; '.join(fields)}"
            )
        return cls(backbone=backbone, adaptor=module.to(backbone.device), info=info)

    def features(self, pixels: Tensor) -> Tensor:
        """Return what the adaptor reads, in float32, from (batch, channel, height, width) uint8 pixels."""
        needed = self.info.features
        parts = [part.values.float() for part in gather(self.backbone(pixels), [needed])]
        return torch.stack(parts, dim=1) if GATHERS[needed.gather].has_tap_axis else parts[0]

    def predict(self, images: Source, samples: Sequence[int], batch_size: int) -> Iterator[tuple[int, Answer | str]]:
        """Yield what is said of each sample, or why its image cannot be used."""
        preprocess = self.backbone.preprocess
        with Decoder(
            source=images, preprocess=preprocess, batch_size=batch_size, n_threads=N_DECODE_THREADS
        ) as decoder:
            for batch in decoder.batches([Sample(index) for index in samples]):
                with torch.inference_mode():
                    answers = self._answers(self.adaptor(self.features(torch.from_numpy(batch.pixels))))
                for i, (sample, result) in enumerate(zip(batch.samples, answers, strict=True)):
                    yield sample.index, batch.reasons.get(i, result)

    def _answers(self, logits: Tensor) -> list[Answer]:
        """The likeliest class of each sample, or where it may have several labels those likelier than not."""
        if self.info.target_kind == "class":
            probability, label = logits.softmax(1).max(1)
            return [
                Answer(labels=(i,), probabilities=(p,))
                for i, p in zip(label.tolist(), probability.tolist(), strict=True)
            ]
        answers = []
        for of_sample in logits.sigmoid().cpu():
            labels = torch.nonzero(of_sample > 0.5).flatten().tolist()
            answers.append(Answer(labels=tuple(labels), probabilities=tuple(of_sample[labels].tolist())))
        return answers

    @property
    def knows_labels(self) -> bool:
        """Whether what is predicted is what a source calls its labels, one a sample."""
        return self.info.target_kind == "class" and self.info.settings.target == "label"

    def name_of(self, label: int) -> str:
        """Return a class's name, or its number where names are not known."""
        return self.info.class_names[label] if self.info.class_names else str(label)

    def is_right(self, label: int, listing: Listing, index: int) -> bool:
        """Return whether a prediction is the sample's label: by name where both sides have names."""
        assert listing.targets is not None
        target = listing.targets[index]
        if listing.class_names and self.info.class_names:
            return listing.class_names[target] == self.name_of(label)
        return target == label


def _require_artefact(run: Path, needed: Mapping[str, str] | None, quantised: Path | None) -> None:
    """Refuse another artefact than that of the run's features, before anything is loaded from it."""
    if quantised is None:
        if needed is not None:
            raise ModelError(
                f"{run} was trained on features of a quantised backbone ({_named(needed)}): give its file with "
                "`quantized`"
            )
        return
    found = read_artefact(quantised).identity()
    if needed is None:
        raise ModelError(
            f"`quantized={str(quantised)!r}` is a quantised backbone ({_named(found)}), and {run} was trained on "
            "features of a float one: leave `quantized` out"
        )
    if found != needed:
        raise ModelError(
            f"`quantized={str(quantised)!r}` is another quantised backbone ({_named(found)}) than that whose features "
            f"{run} was trained on ({_named(needed)}): give that one's file"
        )


def _named(quantisation: Mapping[str, str]) -> str:
    return f"{quantisation['scheme']}, artefact {quantisation['artefact'][:12]}"
