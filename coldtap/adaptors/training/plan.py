"""A trial before it is trained: one adaptor with one setting, planned on a store."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coldtap.adaptors.data.compensated import maps_of
from coldtap.adaptors.data.devices import seeded
from coldtap.adaptors.data.epoch_order import SHUFFLES
from coldtap.adaptors.networks.contract import AdaptorKind, FeatureSpec, copy_final_norm
from coldtap.adaptors.networks.kinds import adaptor_kind
from coldtap.adaptors.networks.options import (
    option_defaults,
    parse_options,
    require_at_least,
    require_positive,
    require_probability,
)
from coldtap.adaptors.runs.run_folder import Fit, Keep, RunSettings
from coldtap.adaptors.training.learner import Member
from coldtap.errors import OptionError
from coldtap.stores import Store

START_STREAM = 0  # random numbers of the start


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a trial is trained; all but the batches and their order may differ among trials that share a pass.

    `lr` None is the adaptor's own default; `order_seed` None is the seed. `compensation` names that of the store which
    features go through; None leaves them as they are.
    """

    epochs: int = 100
    lr: float | None = None
    batch_size: int = 32
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.0
    patience: int | None = None
    seed: int = 0
    order_seed: int | None = None
    shuffle: str = "uniform"
    target: str = "label"
    fit: Fit = "train"
    keep: Keep = "best"
    compensation: str | None = None

    def __post_init__(self) -> None:
        require_at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        require_at_least(0, seed=self.seed, order_seed=self.order_seed or 0)
        require_probability(warmup=self.warmup, label_smoothing=self.label_smoothing)
        if self.lr is not None:
            require_positive(lr=self.lr)
        if not 0 <= self.weight_decay < float("inf"):
            raise OptionError(f"weight_decay={self.weight_decay}: it must be 0 or more, and finite")
        if self.patience is not None:
            require_at_least(1, patience=self.patience)
        if self.shuffle not in SHUFFLES:
            raise OptionError(f"shuffle={self.shuffle}: it must be one of {', '.join(SHUFFLES)}")
        if self.fit == "train+val" and (self.keep != "last" or self.patience is not None):
            raise OptionError(
                "fit=train+val leaves no val to choose or to stop by: it goes with keep=last, no patience"
            )


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """One adaptor with one setting, planned on a store; `name` is unique among the trials of a folder."""

    name: str
    folder: Path
    kind: AdaptorKind[Any]
    features: FeatureSpec
    options: Any
    settings: RunSettings

    def member(self, store: Store, *, n_classes: int, device: torch.device) -> Member:
        """Builds the trial's network and says what a learner must know of it."""
        return Member(
            settings=self.settings,
            network=self.network(store, n_classes=n_classes, device=device),
            is_random=self.options.is_random,
            can_stack=not self.kind.cannot_stack,
        )

    def network(self, store: Store, *, n_classes: int, device: torch.device) -> nn.Module:
        """Builds the trial's network with its start, on the device."""
        with seeded(self.settings.seed, START_STREAM, device):
            network: nn.Module = self.kind.build(self.features, self.options, n_classes=n_classes)
        copy_final_norm(network, store.norm)
        return network.to(device)


def plan_trial(
    store: Store, adaptor: str, training: TrainingOptions, settings: Mapping[str, object], *, name: str, folder: Path
) -> PlannedTrial:
    """Plans a trial on a store.

    Raises:
        OptionError: An unknown adaptor or option, or a value that it cannot take.
        StoreError: The store lacks what the adaptor needs.
    """
    kind = adaptor_kind(adaptor)
    settings = _for_target(store, kind, training.target, settings)
    features, options = kind.plan(store, parse_options(kind.options, settings, adaptor=adaptor))
    maps_of(store, features, training.compensation)  # refused before anything is read
    _require_grid(store, training.target, features)
    run_settings = RunSettings(
        adaptor=adaptor,
        options=asdict(options),
        epochs=training.epochs,
        lr=kind.lr if training.lr is None else training.lr,
        batch_size=training.batch_size,
        weight_decay=training.weight_decay,
        warmup=training.warmup,
        seed=training.seed,
        order_seed=training.seed if training.order_seed is None else training.order_seed,
        store_digest=store.digest,
        extractor_digest=store.recipe.extractor_digest,
        shuffle=training.shuffle,  # type: ignore[arg-type]  # checked by TrainingOptions
        target=training.target,
        label_smoothing=training.label_smoothing,
        patience=training.patience,
        fit=training.fit,
        keep=training.keep,
        compensation=training.compensation,
    )
    return PlannedTrial(name=name, folder=folder, kind=kind, features=features, options=options, settings=run_settings)


def _require_grid(store: Store, target: str, features: FeatureSpec) -> None:
    """Refuses targets a token on another grid than that of the features."""
    grid = store.target_grid(target)
    if grid is not None and tuple(grid) != tuple(features.geometry.grid):
        raise OptionError(
            f"the targets {target!r} are of a grid of {grid[0]} × {grid[1]} tokens, the features of tap "
            f"{features.taps[-1]} of one of {features.geometry.grid[0]} × {features.geometry.grid[1]}: choose another "
            "tap with --set tap=N, or give targets of this grid"
        )


def _for_target(
    store: Store, kind: AdaptorKind[Any], target: str, settings: Mapping[str, object]
) -> Mapping[str, object]:
    """Lets an adaptor answer for each token where the targets are a token's, and only there."""
    a_token = store.target_kind(target) == "token-class"
    asked = settings.get("pool")
    if not a_token:
        if asked == "tokens":
            raise OptionError(
                f"pool=tokens answers for each token; the targets {target!r} are one a sample: leave it out"
            )
        return settings
    if "pool" not in option_defaults(kind.options):
        raise OptionError(
            f"adaptor {kind.name} answers once a sample, and the targets {target!r} are one a token: "
            "use linear, mist, ladder or last"
        )
    if asked not in (None, "tokens"):
        raise OptionError(f"pool={asked}: the targets {target!r} are one a token: use pool=tokens, or leave it out")
    return {**settings, "pool": "tokens"}
