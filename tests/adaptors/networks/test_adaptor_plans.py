"""What an adaptor asks of a store, and what it says when the store cannot give it."""

import numpy as np
import pytest

from coldtap.adaptors.networks.kinds import ADAPTORS, adaptor_kind
from coldtap.adaptors.networks.options import parse_options
from coldtap.errors import MissingFeaturesError, OptionError
from coldtap.stores import open_store
from coldtap.stores.format.geometry import Geometry
from tests.helpers.synthetic import GEOMETRY, synthetic_store

N = 6
NO_PREFIX = Geometry(grid=(2, 3), prefix_tokens=0, channels=8)
STAGES = {0: Geometry(grid=(2, 3), prefix_tokens=0, channels=8), 1: Geometry(grid=(3, 2), prefix_tokens=0, channels=8)}


def store_of(path, *, geometries=None, gathers=None, n_taps=5):
    tokens = (geometries or {0: GEOMETRY})[0].tokens
    features = np.zeros((N, n_taps, tokens, 8), np.float32)
    splits = ["train"] * 4 + ["val"] * 2
    synthetic_store(path, features, [0, 1] * 3, splits, geometries=geometries, gathers=gathers, block_rows=4)
    return open_store(path)


def plan(store, adaptor, **settings):
    kind = ADAPTORS[adaptor]
    return kind.plan(store, parse_options(kind.options, settings, adaptor=adaptor))


@pytest.fixture
def vit(tmp_path):
    return store_of(tmp_path / "vit", gathers={"layers": range(5), "sum": [2, 4], "pooled": range(5)})


@pytest.mark.parametrize(
    ("adaptor", "settings", "array", "taps"),
    [
        ("linear", {}, "pooled/g2x3-p1-c8", (4,)),
        ("linear", {"tap": "-2"}, "pooled/g2x3-p1-c8", (3,)),
        ("linear", {"tap": 0}, "pooled/g2x3-p1-c8", (0,)),
        ("linear", {"norm_at": "before"}, "layers/g2x3-p1-c8", (4,)),
        ("mist", {}, "sum/g2x3-p1-c8/4", (4,)),
        ("mist", {"at": "2"}, "sum/g2x3-p1-c8/2", (2,)),
        ("last", {}, "layers/g2x3-p1-c8", (0, 1, 2, 3, 4)),
        ("last", {"gap": "2"}, "layers/g2x3-p1-c8", (0, 2, 4)),
        ("last", {"gap": "4"}, "layers/g2x3-p1-c8", (0, 4)),
        ("attentive", {"queries": 4}, "layers/g2x3-p1-c8", (4,)),
        ("attentive", {"queries": 4, "tap": -3}, "layers/g2x3-p1-c8", (2,)),
        ("head2toe", {}, "pooled/g2x3-p1-c8", (0, 1, 2, 3, 4)),
        ("ladder", {"reduction": 2, "gap": 2}, "layers/g2x3-p1-c8", (0, 2, 4)),
        ("combo", {}, "layers/g2x3-p1-c8", (1, 2, 3, 4)),
        ("combo", {"gap": "2"}, "layers/g2x3-p1-c8", (2, 4)),
    ],
)
def test_each_adaptor_reads_what_it_needs(vit, adaptor, settings, array, taps):
    spec, _ = plan(vit, adaptor, **settings)
    assert (spec.array, spec.taps) == (array, taps)
    assert spec.row_shape == (vit.arrays[array].row_shape if adaptor == "mist" else (len(taps), *spec.row_shape[1:]))


@pytest.mark.parametrize(
    ("adaptor", "settings", "norm"),
    [
        ("linear", {}, "backbone"),
        ("linear", {"tap": 2}, "new"),
        ("mist", {}, "new"),
        ("mist", {"norm": "backbone"}, "backbone"),
        ("last", {}, "backbone"),
        ("last", {"bias_correction": "no"}, "new"),
        ("last", {"norm": "none"}, "none"),
        ("attentive", {"queries": 4}, "backbone"),
        ("attentive", {"queries": 4, "tap": 2}, "new"),
        ("ladder", {"reduction": 2}, "new"),
    ],
)
def test_an_automatic_norm_is_settled_and_written_into_the_options(vit, adaptor, settings, norm):
    assert plan(vit, adaptor, **settings)[1].norm == norm


def test_linear_falls_back_to_layers(tmp_path):
    store = store_of(tmp_path / "s", gathers={"layers": [3, 4]})
    spec, options = plan(store, "linear")
    assert (spec.array, spec.taps, options.tap) == ("layers/g2x3-p1-c8", (4,), 4)


@pytest.mark.parametrize(("tap", "array"), [(0, "g2x3-p0-c8"), (1, "g3x2-p0-c8"), (-1, "g3x2-p0-c8")])
def test_probes_find_the_geometry_that_holds_a_stage(tmp_path, tap, array):
    store = store_of(tmp_path / "s", geometries=STAGES, gathers={"pooled": [0, 1], "layers": [0, 1]}, n_taps=2)
    assert plan(store, "linear", tap=tap)[0].array == f"pooled/{array}"
    assert plan(store, "attentive", tap=tap, queries=2)[0].array == f"layers/{array}"


def test_head2toe_takes_the_taps_that_are_pooled(tmp_path):
    store = store_of(tmp_path / "s", gathers={"pooled": [1, 4]})
    assert plan(store, "head2toe")[0].taps == (1, 4)


@pytest.mark.parametrize(
    ("gathers", "adaptor", "settings", "message"),
    [
        (
            {"sum": [4], "pooled": range(5)},
            "last",
            {},
            r"LAST needs `layers`; .*s holds sum, pooled: .* `gather='layers'`",
        ),
        ({"layers": [3, 4]}, "last", {}, r"gap=1 needs taps \[0, 1, 2, 3, 4\]; .* lacks \[0, 1, 2\] .*`taps='all'`"),
        ({"layers": range(5)}, "mist", {}, r"MIST needs `sum`; .*s holds layers: cache again with `gather='sum'`"),
        ({"sum": [2, 4]}, "mist", {"at": 3}, r"needs the sum at tap 3; .* holds sums at 2, 4: .*`sum_at='3'`"),
        (
            {"sum": [4]},
            "linear",
            {},
            r"linear needs tap -1 in `pooled` or `layers`; .* holds sum: "
            r"cache again with `gather='pooled'` and `taps='all'`",
        ),
        ({"pooled": [4]}, "linear", {"tap": 2}, r"linear needs tap 2 .* there with taps \[4\]: .*`gather='pooled'`"),
        ({"pooled": [4]}, "linear", {"norm_at": "before"}, r"linear needs tap -1 in `layers`; .* holds pooled"),
        (
            {"pooled": [4], "sum": [4]},
            "attentive",
            {"tap": -2},
            r"attentive needs tap -2 in `layers`; .* holds sum, pooled: "
            r"cache again with `gather='layers'` and `taps='3'`",
        ),
        (
            {"layers": [4]},
            "attentive",
            {"tap": 9},
            r"attentive needs tap 9 .* taps \[4\]: .*`taps='all'`",
        ),
        (
            {"layers": [4]},
            "head2toe",
            {},
            r"head2toe needs `pooled`; .*s holds layers: .*`gather='pooled'`",
        ),
        ({"sum": [4]}, "ladder", {}, r"ladder needs `layers`; .*s holds sum: cache again with `gather='layers'`"),
        (
            {"layers": [0, 4]},
            "combo",
            {"gap": 2},
            r"combo with gap=2 needs taps \[2, 4\]; .* lacks \[2\] .*`taps='all'`",
        ),
    ],
)
def test_missing_features_say_what_is_needed_what_is_there_and_what_to_do(
    tmp_path, gathers, adaptor, settings, message
):
    store = store_of(tmp_path / "s", gathers=gathers)
    with pytest.raises(MissingFeaturesError, match=message):
        plan(store, adaptor, **settings)


@pytest.mark.parametrize("adaptor", ["head2toe", "mist", "ladder", "combo", "last"])
def test_stage_networks_are_refused_in_one_line(tmp_path, adaptor):
    store = store_of(tmp_path / "s", geometries=STAGES, gathers={"layers": [0, 1]}, n_taps=2)
    with pytest.raises(
        MissingFeaturesError, match=r"one geometry, z0 … zN; .* stages of a stage network \(synthetic\)"
    ):
        plan(store, adaptor)


def test_a_prefix_token_that_is_not_there_cannot_be_pooled(tmp_path):
    store = store_of(tmp_path / "s", geometries=dict.fromkeys(range(5), NO_PREFIX))
    with pytest.raises(OptionError, match=r"pool=both: the backbone has no prefix token: use pool=patch-mean"):
        plan(store, "linear", pool="both")


def test_a_norm_that_is_not_there_cannot_be_used(vit):
    vit.__dict__["norm"] = None  # what a backbone without a final norm leaves
    with pytest.raises(OptionError, match=r"norm=backbone: the store has no final norm of 8 channels"):
        plan(vit, "mist", norm="backbone")
    assert plan(vit, "last")[1].norm == "new"


def test_a_gap_must_divide_the_depth(vit):
    with pytest.raises(OptionError, match=r"gap=3 does not divide the backbone's depth of 4 blocks"):
        plan(vit, "last", gap=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rnak": "4"}, r"adaptor last has no option 'rnak'; it knows pool=patch-mean, .*rank=4"),
        ({"rank": "four"}, r"rank=four: it must be a whole number"),
        ({"rank": "4.5"}, r"rank=4.5: it must be a whole number"),
        ({"rank": 0}, r"rank=0: it must be 1 or more"),
        ({"rank": 4, "heads": 3}, r"rank=4 must be divisible by heads=3"),
        ({"modules": -1}, r"modules=-1: it must be 1 or more"),
        ({"dropout": "much"}, r"dropout=much: it must be a number"),
        ({"dropout": 1}, r"dropout=1.0: it must be at least 0 and below 1"),
        ({"drop_path": "nan"}, r"drop_path=nan: it must be at least 0 and below 1"),
        ({"scale": "inf"}, r"scale=inf: it must be above 0 and finite"),
        ({"bias": "maybe"}, r"bias=maybe: it must be true or false"),
        ({"recursion": "C"}, r"recursion=C: it must be one of A, B"),
        ({"pool": "cls"}, r"pool=cls: it must be one of patch-mean, prefix, both, all"),
        ({"norm": "old"}, r"norm=old: it must be one of auto, backbone, new, none"),
    ],
)
def test_a_bad_option_is_named_with_what_it_may_be(settings, message):
    with pytest.raises(OptionError, match=message):
        parse_options(ADAPTORS["last"].options, settings, adaptor="last")


def test_an_unknown_adaptor_is_refused_with_the_known_ones():
    with pytest.raises(
        OptionError, match=r"unknown adaptor 'lora'; known are linear, attentive, head2toe, mist, ladder, combo, last"
    ):
        adaptor_kind("lora")
