"""`coldtap inspect STORE`."""

import json
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from coldtap.cli.compensate import gain_lines
from coldtap.cli.measured_errors import show_errors, show_share
from coldtap.cli.options import AsJson, FollowLinks
from coldtap.cli.output import say
from coldtap.stores.format.codes import describe_bound
from coldtap.stores.format.features import CHUNK_DIGESTS
from coldtap.stores.format.tiers import TIERS
from coldtap.text import show_bytes


def inspect(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store, complete or not.")],
    follow_links: FollowLinks = False,
    as_json: AsJson = False,
) -> None:
    """Show what a store is: recipe, arrays, sizes, splits, labels, ranges, complete or not."""
    from coldtap.stores.reading.describe import describe_store
    from coldtap.stores.storage.address import storage_at

    about = describe_store(storage_at(store, follow_links=follow_links))
    if as_json:
        print(json.dumps(about, indent=1))
        return
    for line in _lines(about):
        say(line)


def _arithmetic(extractor: dict[str, Any]) -> str:
    """The precision of a backbone, or the scheme and the artefact of a quantised one."""
    quantised = extractor["quantisation"]
    if quantised is None:
        return str(extractor["precision"])
    return f"{quantised['scheme']}, compensation {quantised['compensation']}, artefact {quantised['artefact'][:12]}"


def _lines(about: dict[str, Any]) -> list[str]:
    extractor, rows, encoding = (about["recipe"][part] for part in ("extractor", "rows", "encoding"))
    recorded = about["recorded"]
    prep = extractor["preprocess"]
    lines = [
        f"store      {about['path']}  {show_bytes(about['n_bytes'])}",
        f"state      {_state(about)}",
        f"address    {about['address']}",
        f"backbone   {extractor['architecture']}  ({_arithmetic(extractor)}, weights {extractor['weights'][:12]})",
        f"input      {prep['height']} × {prep['width']}, {prep['interpolation']}, {prep['crop_mode']} crop "
        f"{prep['crop_pct']}, mean {prep['mean']}, std {prep['std']}",
        f"source     {recorded['source']}  views {rows['views']}, seed {rows['seed']}",
        f"made on    {', '.join(f'{k} {v}' for k, v in recorded['environment'].items())}",
        f"encoding   {encoding['tier']}, {encoding['layout']}, {encoding['block_rows']} rows per block",
    ]
    if "converted_from" in recorded:
        lines.append(f"converted  {_origin(about)}")
    if not about["complete"]:
        return lines
    lines += [
        f"digest     {about['digest']}",
        f"format     {_format(about)}",
        f"norm       {about['norm'] or 'none'}",
        "",
    ]
    for split, of in about["splits"].items():
        augmented = f" + {of['augmented_rows']} augmented rows" if of["augmented_rows"] else ""
        lines.append(f"{split:<6} {of['samples']:>8} samples{augmented}{_labels(of.get('labels'))}")
    lines += [line for name, of in about["targets"].items() for line in _target_lines(name, of)]
    lines += [line for name, fitted in about["compensations"].items() for line in _compensation_lines(name, fitted)]
    if about["n_rejected"]:
        lines.append(f"rejected {about['n_rejected']:>6} rows, such as:")
        lines += [f"    {bad['source']}: {bad['reason']}" for bad in about["rejected"][:5]]
    for array in about["arrays"]:
        lines += ["", *_array_lines(array)]
    return lines


def _state(about: dict[str, Any]) -> str:
    if about["complete"]:
        return f"complete, {about['n_rows']} rows"
    command = "coldtap convert" if "converted_from" in about["recorded"] else "cache-features"
    return f"incomplete: {about['finished_blocks']} blocks finished; run the same {command} command to go on"


def _format(about: dict[str, Any]) -> str:
    if CHUNK_DIGESTS in about["requires"]:
        return f"{about['format']} ({', '.join(about['requires'])})"
    return (
        f"{about['format']}: reading does not check that a chunk lies at its own place; `coldtap verify` does, and "
        "`coldtap convert` into the same tier makes a store of which reading does"
    )


def _origin(about: dict[str, Any]) -> str:
    """The store that this one was converted from, and what its own errors were."""
    origin = about["recorded"]["converted_from"]
    text = f"from {origin['tier']}, {origin['layout']}, digest {origin['digest'][:12]}"
    if not TIERS[origin["tier"]].is_coded:
        return text
    if origin["scales"] == about["recipe"]["encoding"]["scales"]:
        return f"{text}, with its codes"
    return f"{text}, whose errors ({describe_bound(origin['scales'])}) stay beside those below"


def _labels(labels: dict[str, int] | None) -> str:
    if not labels:
        return ""
    counts = list(labels.items())
    shown = ", ".join(f"{name} {n}" for name, n in counts[:10])
    return f"   {len(counts)} classes: {shown}{' …' if len(counts) > 10 else ''}"


def _target_lines(name: str, of: dict[str, Any]) -> list[str]:
    """Kind and counts of some targets; those of `label` stand in the lines of the splits."""
    grid = f" on {of['grid'][0]} × {of['grid'][1]} tokens, which are counted" if of["grid"] else ""
    counts = {} if name == "label" else of["counts"]
    head = f"targets    {name}: {of['kind']}, {of['n_classes']} classes{grid}"
    return [head, *(f"    {split:<6}{_labels(labels)}" for split, labels in counts.items())]


def _compensation_lines(name: str, fitted: dict[str, Any]) -> list[str]:
    """On what maps were fitted, and what they gain on samples that were held out."""
    head = (
        f"compensated by {name}: {fitted['rows']} {fitted['split']} rows of the float store "
        f"{fitted['float_store']['digest'][:12]}, ridge {fitted['ridge']:g}"
    )
    return [head, *(line for array, gains in fitted["gain"].items() for line in gain_lines(array, gains))]


def _array_lines(array: dict[str, Any]) -> list[str]:
    shape = ", ".join(f"{name} {n}" for name, n in zip(array["dimensions"], array["shape"], strict=True))
    lines = [
        f"{array['name']}  ({shape})  {array['tier']}{', compact' if array['layout'] == 'compact' else ''}  "
        f"{show_bytes(array['bytes_per_row'])} per row, {show_bytes(array['n_bytes'])}"
    ]
    if "bound" in array:
        lines.append(
            f"    {array['bound']}; {array['bits_per_value']:.2f} bits per value on disk; {array['escapes']} escapes "
            f"({show_share(array['escaped_share'])})"
        )
    parts = array["ranges"], array["errors"], array.get("escapes_by_tap", ())
    for tap, exponent, (reach, errors, escapes) in zip(
        array["taps"], array["scale_exponents"], zip_longest(*parts), strict=False
    ):
        said = [
            f"  {reach[0]:>10.4g} … {reach[1]:<10.4g}" if reach else "",
            f"  kept as x / 2^{exponent}" if exponent else "",
            f"  {show_errors(errors)}" if errors else "",  # measured on rows that set no scales
            f"  {escapes} escapes" if escapes else "",
        ]
        lines.append(f"    tap {tap:>3}{''.join(said)}")
    return lines
