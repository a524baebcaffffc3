"""What the user asks to keep: taps and sums as written on the command line, turned into indices."""

from collections.abc import Mapping, Sequence

from coldtap.errors import ModelError, OptionError
from coldtap.stores.format.gathers import GATHERS


def choose_gathers(
    gathers: Sequence[str] | None, taps: str, sum_at: str | None, *, depth: int, one_stream: bool
) -> Mapping[str, tuple[int, ...]]:
    """Return tap indices per gather.

    What is asked is as in `cache_features`; depth is N, the index of the last tap. Where the taps are not one stream of
    tokens, z0 … zN, there is no sum.

    Raises:
        OptionError: an unknown gather or a malformed choice, or a sum of stages.
        ModelError: a tap that the backbone does not have.
    """
    if gathers is not None and (unknown := [name for name in gathers if name not in GATHERS]):
        raise OptionError(f"`gather={unknown[0]!r}`: choose among {', '.join(GATHERS)}")
    asked = [name for name in GATHERS if gathers is None or name in gathers]
    if "sum" in asked and not one_stream:
        if gathers is not None:
            raise OptionError(
                "`gather='sum'` needs taps of one geometry, z0 … zN, and this backbone is a stage network: "
                "use `gather='layers'` or pooled"
            )
        asked.remove("sum")
    chosen = parse_taps(taps, depth, option="taps")
    sums = (depth,) if sum_at is None else parse_taps(sum_at, depth, option="sum_at")
    return {name: sums if GATHERS[name].takes_sums else chosen for name in asked}


def parse_taps(text: str, depth: int, *, option: str) -> tuple[int, ...]:
    """Parse tap indices, ascending, from `all`, `last:K` or indices with commas.

    Raises:
        OptionError: the text has another form.
        ModelError: a tap that the backbone does not have.
    """
    if text == "all":
        return tuple(range(depth + 1))
    try:
        if text.startswith("last:"):
            count = int(text.removeprefix("last:"))
            taps = list(range(depth + 1 - count, depth + 1))
            if count < 1:
                raise ValueError
        else:
            taps = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise OptionError(f"`{option}={text!r}`: expected all, last:K, or tap indices such as 0,3,6") from None
    if unknown := [tap for tap in taps if not 0 <= tap <= depth]:
        raise ModelError(f"`{option}={text!r}`: the backbone has taps 0 to {depth}; there is no tap {unknown[0]}")
    return tuple(taps)
