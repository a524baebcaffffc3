"""A trial before it is trained: what was asked, decided on a store."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import nn

from coldtap.adaptors.data.batches import FeatureBatches
from coldtap.adaptors.data.compensated import maps_of
from coldtap.adaptors.data.devices import seeded
from coldtap.adaptors.metrics.tasks import require_scorer
from coldtap.adaptors.networks.contract import AdaptorKind, FeatureSpec, copy_final_norm
from coldtap.adaptors.networks.kinds import adaptor_kind
from coldtap.adaptors.networks.options import option_defaults, parse_options
from coldtap.adaptors.runs.settings import RunSettings
from coldtap.adaptors.training.options import TrialOptions
from coldtap.errors import OptionError
from coldtap.stores import Store
from coldtap.stores.format.compensation import TapMaps
from coldtap.stores.storage.address import Place, storage_at
from coldtap.stores.storage.contract import Storage

START_STREAM = 0  # random numbers of the start have stream 0, those of step k stream k + 1


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """One trial, decided on a store: all that must be known before anything is read.

    Attributes:
        asked: What was asked for.
        folder: The run folder; its name is unique among trials that are trained together.
        kind: The adaptor.
        features: What it reads.
        options: Its options, parsed and settled for the store.
        settings: What decides the result, as the record has it.
    """

    asked: TrialOptions
    folder: Storage
    kind: AdaptorKind[Any]
    features: FeatureSpec
    options: Any
    settings: RunSettings

    @property
    def name(self) -> str:
        """What the trial is called."""
        return PurePath(str(self.folder)).name

    def network(self, store: Store, *, n_classes: int, device: torch.device) -> nn.Module:
        """Build the trial's network with its start, on the device."""
        with seeded(self.settings.seed, START_STREAM, device):
            network: nn.Module = self.kind.build(self.features, self.options, n_classes=n_classes)
        copy_final_norm(network, store.norm)
        return network.to(device)

    def maps(self, store: Store) -> TapMaps | None:
        """Return the compensation that features go through; None where there is none."""
        return maps_of(store, self.features, self.settings.compensation)

    def batches(
        self, store: Store, split: str, *, device: torch.device, resident: bool | None = None
    ) -> FeatureBatches:
        """Return the batches of a split as the trial reads them."""
        return batches_for(
            store, self.features, self.settings, split, device=device, resident=resident, maps=self.maps(store)
        )


def batches_for(
    store: Store,
    features: FeatureSpec,
    settings: RunSettings,
    split: str,
    *,
    device: torch.device,
    resident: bool | None,
    maps: TapMaps | None,
) -> FeatureBatches:
    """Return the batches of a split as settings say: of their size, targets and order."""
    return FeatureBatches(
        store,
        features,
        split,
        batch_size=settings.batch_size,
        target=settings.target,
        resident=resident,
        device=device,
        shuffle=settings.shuffle,
        maps=maps,
    )


def plan_trial(store: Store, asked: TrialOptions, *, folder: Place) -> TrialPlan:
    """Plan a trial on a store.

    Raises:
        OptionError: An unknown adaptor or option, or a value that it cannot take.
        StoreError: The store lacks what the adaptor needs.
        MachineError: A package that scores the targets is not installed.
    """
    kind, training = adaptor_kind(asked.adaptor), asked.training
    require_scorer(store.target_kind(training.target))
    settings = _for_target(store, kind, training.target, asked.options)
    features, options = kind.plan(store, parse_options(kind.options, settings, adaptor=asked.adaptor))
    maps_of(store, features, training.compensation)  # refused before anything is read
    _require_grid(store, training.target, features)
    run_settings = RunSettings(
        adaptor=asked.adaptor,
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
    return TrialPlan(
        asked=asked,
        folder=storage_at(folder),
        kind=kind,
        features=features,
        options=options,
        settings=run_settings,
    )


def _require_grid(store: Store, target: str, features: FeatureSpec) -> None:
    """Refuse targets a token on another grid than that of the features."""
    grid = store.target_grid(target)
    if grid is not None and tuple(grid) != tuple(features.geometry.grid):
        raise OptionError(
            f"the targets {target!r} are of a grid of {grid[0]} × {grid[1]} tokens, the features of tap "
            f"{features.taps[-1]} of one of {features.geometry.grid[0]} × {features.geometry.grid[1]}: choose another "
            "tap with `settings['tap']=N`, or give targets of this grid"
        )


def _for_target(
    store: Store, kind: AdaptorKind[Any], target: str, settings: Mapping[str, object]
) -> Mapping[str, object]:
    """Let an adaptor answer for each token where the targets are a token's, and only there."""
    a_token = store.target_kind(target) == "token-class"
    asked = settings.get("pool")
    if not a_token:
        if asked == "tokens":
            raise OptionError(
                f"pool=tokens answers for each token; the targets {target!r} are one per sample: leave it out"
            )
        return settings
    if "pool" not in option_defaults(kind.options):
        raise OptionError(
            f"adaptor {kind.name} answers once per sample, and the targets {target!r} are one per token: "
            "use linear, mist, ladder or last"
        )
    if asked not in (None, "tokens"):
        raise OptionError(f"pool={asked}: the targets {target!r} are one per token: use pool=tokens, or leave it out")
    return {**settings, "pool": "tokens"}
