"""What a store must hold for a training to have something to learn."""

from coldtap.adaptors.data.batches import FeatureBatches
from coldtap.adaptors.runs.settings import Fit
from coldtap.errors import SourceError
from coldtap.stores import Store


def require_splits(store: Store, fit: Fit) -> None:
    """Refuse a store that lacks a split.

    Raises:
        SourceError: There is no train or no val.
    """
    held = ", ".join(f"{split} ({n})" for split, n in store.splits.items()) or "none"
    use = "to learn from as well" if fit == "train+val" else "to choose the best epoch on"
    for split, purpose in (("train", "to learn from"), ("val", use)):
        if split not in store.splits:
            raise SourceError(
                f"{store.storage} has no {split} split {purpose}; it holds {held}: cache again without `split`"
            )


def require_something_to_learn(store: Store, train: FeatureBatches, target: str) -> None:
    """Refuse targets that are all alike.

    Raises:
        SourceError: Less than two samples, or a single class or target.
    """
    if train.n_samples < 2:
        raise SourceError(f"{store.storage} has {train.n_samples} train sample: there is nothing to tell apart")
    if train.task.kind == "class":
        present = train.targets.unique().tolist()
        names = store.class_names(target)
        alike = f"is of class {(names[present[0]] if names else present[0])!r}" if len(present) < 2 else None
    else:
        alike = f"has the same {target!r}" if len(train.targets.unique(dim=0)) < 2 else None
    if alike is not None:
        raise SourceError(f"{store.storage}: every train sample {alike}: there is nothing to tell apart")
