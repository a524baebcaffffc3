"""Where features are made can change their last bits: a store goes on where it began."""

from typing import Any

from coldtap.errors import StoreError

COMPARED = ("device", "torch", "timm", "kernel", "batch_size")


def require_same_environment(before: dict[str, Any], now: dict[str, Any], *, allow_mixed: bool) -> None:
    """Refuse to go on with a store in another environment, unless told that a mix is fine.

    Raises:
        StoreError: naming what differs; features of the two would differ in their last bits.
    """
    changed = [f"{key}: {before.get(key)} → {now.get(key)}" for key in COMPARED if before.get(key) != now.get(key)]
    if changed and not allow_mixed:
        same = " with the same `kernel`" if "kernel" in before else ""
        raise StoreError(
            f"the store was begun elsewhere ({'; '.join(changed)}), and features would differ in their last bits: "
            f"go on there{same}, or accept a mix with `allow_mixed` (each block records where it was made)"
        )
