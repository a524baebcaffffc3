"""Every adaptor passes the shipped test class, the documented example too; the rivals compute what their papers say."""

import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from coldtap.adaptors.networks.attentive import AttentiveOptions, build_attentive
from coldtap.adaptors.networks.combo import ComboOptions, build_combo
from coldtap.adaptors.networks.contract import EpochAware, FeatureSpec, Penalised
from coldtap.adaptors.networks.head2toe import Head2ToeOptions, build_head2toe
from coldtap.adaptors.networks.kinds import ADAPTORS, adaptor_kind
from coldtap.adaptors.networks.ladder import LadderOptions, build_ladder
from coldtap.adaptors.networks.linear import LINEAR
from coldtap.adaptors.networks.options import parse_options
from coldtap.adaptors.networks.testing import AdaptorTests
from coldtap.adaptors.networks.transformer import TransformerBlock, block_parameters
from coldtap.errors import OptionError
from coldtap.stores import open_store
from coldtap.stores.format.geometry import Geometry
from tests.helpers.places import ROOT
from tests.helpers.synthetic import layer_norm, synthetic_store

GEOMETRY = Geometry(grid=(2, 3), prefix_tokens=1, channels=32)
N_TAPS = 5
POOR = {"linear": "sum", "attentive": "pooled", "head2toe": "layers", "mist": "layers"}  # the others lack `layers`
DOCS = ROOT / "docs" / "adaptors.md"


def small_store(path, gathers):
    features = np.zeros((6, N_TAPS, GEOMETRY.tokens, GEOMETRY.channels), np.float32)
    geometries = dict.fromkeys(range(N_TAPS), GEOMETRY)
    splits, norm = ["train"] * 4 + ["val"] * 2, layer_norm(GEOMETRY.channels)
    synthetic_store(path, features, [0, 1] * 3, splits, geometries=geometries, gathers=gathers, norm=norm)
    return open_store(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    gathers = {"layers": range(N_TAPS), "sum": [2, N_TAPS - 1], "pooled": range(N_TAPS)}
    return small_store(tmp_path_factory.mktemp("stores") / "whole", gathers)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return {gather: small_store(folder / gather, {gather: [N_TAPS - 1]}) for gather in ("layers", "sum", "pooled")}


class FamilyTests(AdaptorTests):
    @pytest.fixture
    def poor_store(self, parts):
        return parts[POOR.get(self.kind.name, "pooled")]


class TestLinear(FamilyTests):
    kind = ADAPTORS["linear"]
    settings = (
        {},
        {"tap": 1, "pool": "both"},
        {"norm": "none", "pool": "prefix"},
        {"norm": "new", "norm_at": "before", "pool": "all"},
        {"pool": "tokens"},
    )


class TestAttentive(FamilyTests):
    kind = ADAPTORS["attentive"]
    settings = (
        {},
        {"queries": 4, "reduction": 2, "norm": "new"},
        {"queries": 1, "attend": "all", "tap": 0},
        {"norm": "none", "pooled_norm": False},
    )


class TestHead2Toe(FamilyTests):
    kind = ADAPTORS["head2toe"]
    settings = ({}, {"keep": 0.3, "lasso": 0.1, "select_after": 0.0}, {"scaling": "unit", "keep": 1.0})


class TestMist(FamilyTests):
    kind = ADAPTORS["mist"]
    settings = (
        {},
        {"at": 2, "depth": 2, "rank": 6, "heads": 3},
        {"bias": True, "entry_norm": False, "norm": "backbone"},
        {"lsa_norm": False, "norm": "none", "pool": "both", "init": "random"},
        {"depth": 2, "dropout": 0.5},
        {"depth": 2, "drop_path": 0.5},
        {"depth": 1, "pool": "tokens"},
    )


class TestLadder(FamilyTests):
    kind = ADAPTORS["ladder"]
    settings = (
        {},
        {"gap": 2, "reduction": 4, "heads": 2, "mlp_ratio": 1, "pool": "both", "norm": "none"},
        {"gap": 4, "tap_norm": True, "temperature": 1.0},
        {"gap": 4, "dropout": 0.5},
        {"gap": 4, "pool": "tokens"},
    )


class TestCombo(FamilyTests):
    kind = ADAPTORS["combo"]
    settings = (
        {},
        {"gap": 2, "width": 12, "depth": 2, "heads": 3, "hidden": 20, "tap_norm": False},
        {"depth": 1, "dropout": 0.5},
    )


class TestLast(FamilyTests):
    kind = ADAPTORS["last"]
    settings = (
        {},
        {"gap": 2, "modules": 1, "rank": 6, "heads": 2, "recursion": "A"},
        {"gap": 4, "bias": True, "bias_correction": False, "norm_at": "before"},
        {"gap": 4, "lsa_norm": False, "pool": "both", "norm": "none", "init": "random"},
        {"gap": 4, "dropout": 0.5},
        {"gap": 4, "drop_path": 0.5},
        {"gap": 4, "modules": 1, "pool": "tokens"},
    )


def test_every_adaptor_has_its_tests():
    tested = {each.kind.name for each in FamilyTests.__subclasses__()}
    assert tested == set(ADAPTORS)
    assert list(ADAPTORS) == ["linear", "attentive", "head2toe", "mist", "ladder", "combo", "last"]


def spec(gather="layers", taps=(0, 1, 2, 3, 4), geometry=GEOMETRY):
    return FeatureSpec(array="any", gather=gather, taps=taps, depth=N_TAPS - 1, geometry=geometry, final_norm=None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.double()


def test_attentive_queries_see_their_own_share_of_the_values():
    options = AttentiveOptions(queries=4, reduction=2, norm="none", pooled_norm=False)
    probe = randomise(build_attentive(spec(taps=(4,)), options, n_classes=3))
    features = torch.randn(2, 1, GEOMETRY.tokens, 32, dtype=torch.float64)
    patches = features[:, 0, 1:]
    parts = [
        torch.softmax(patches @ query / math.sqrt(32), dim=1)[:, None]
        @ patches
        @ probe.values.weight[4 * j : 4 * j + 4].T
        for j, query in enumerate(probe.queries)
    ]
    expected = torch.cat(parts, dim=-1)[:, 0]
    torch.testing.assert_close(probe.pool(features[:, 0]), expected)
    torch.testing.assert_close(probe(features), probe.head.classifier(expected))


def test_the_ladder_mixes_what_it_has_with_each_tap():
    options = LadderOptions(gap=2, reduction=4, heads=2, norm="none", tap_norm=True)
    ladder = randomise(build_ladder(spec(taps=(0, 2, 4)), options, n_classes=3))
    taps = torch.randn(2, 3, GEOMETRY.tokens, 32, dtype=torch.float64)
    x = F.layer_norm(taps, (32,), eps=1e-6)
    h = ladder.down[0](x[:, 0])
    for i in (1, 2):
        kept = torch.sigmoid(ladder.gates[i - 1] / 0.1)
        h = ladder.blocks[i - 1](kept * h + (1 - kept) * ladder.down[i](x[:, i]))
    patches = ladder.up(F.layer_norm(h, (8,), ladder.norm.weight, ladder.norm.bias, 1e-6))[:, 1:]
    torch.testing.assert_close(ladder(taps), ladder.head.classifier(patches.mean(1)))


def test_a_fresh_ladder_takes_half_of_each():
    assert torch.sigmoid(build_ladder(spec(), LadderOptions(norm="none"), n_classes=3).gates).unique().tolist() == [0.5]


def test_combo_maps_each_token_alone_and_classifies_its_class_token():
    combo = randomise(build_combo(spec(taps=(1, 2)), ComboOptions(width=8, depth=2, heads=2, hidden=6), n_classes=3))
    taps = torch.randn(2, 2, GEOMETRY.tokens, 32, dtype=torch.float64)
    tokens = [combo.class_token.expand(2, 8)]
    for t in range(GEOMETRY.tokens):
        normed = [
            (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True) for x in taps[:, :, t].unbind(1)
        ]
        tokens.append(combo.map(torch.cat(normed, dim=-1)))
    expected = combo.head.classifier(combo.head.norm(combo.blocks(torch.stack(tokens, dim=1))[:, 0]))
    torch.testing.assert_close(combo(taps), expected, rtol=1e-4, atol=1e-4)


def test_the_block_is_torchs_pre_norm_encoder_layer():
    block = TransformerBlock(width=12, heads=3, hidden=20)
    assert block_parameters(width=12, hidden=20) == sum(parameter.numel() for parameter in block.parameters())
    theirs = torch.nn.TransformerEncoderLayer(
        12, 3, 20, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    parts = {
        "attention_norm": "norm1",
        "mlp_norm": "norm2",
        "out": "self_attn.out_proj",
        "mlp.0": "linear1",
        "mlp.2": "linear2",
    }
    names = {f"{ours}.{kind}": f"{other}.{kind}" for ours, other in parts.items() for kind in ("weight", "bias")}
    names |= {f"qkv.{kind}": f"self_attn.in_proj_{kind}" for kind in ("weight", "bias")}
    state = block.state_dict()
    theirs.load_state_dict({other: state[ours] for ours, other in names.items()})
    x = torch.randn(4, 7, 12)
    torch.testing.assert_close(block(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_head2toe_selects_the_features_with_the_largest_weights_once():
    options = Head2ToeOptions(keep=0.25, lasso=0.5, select_after=0.5)
    module = build_head2toe(spec("pooled"), options, n_classes=3)
    assert isinstance(module, EpochAware)
    assert isinstance(module, Penalised)
    weight = module.head.classifier.weight
    norms = weight.detach().square().sum(0).sqrt()
    torch.testing.assert_close(module.penalty().detach(), 0.5 * norms.sum())
    for epoch in (1, 2, 3):  # of 6: the first three select nothing
        module.begin_epoch(epoch, 6)
        assert module.mask.all()
    module.begin_epoch(4, 6)
    n_features = N_TAPS * 2 * 32
    assert module.mask.sum() == n_features // 4
    assert norms[module.mask == 1].min() >= norms[module.mask == 0].max()
    assert module.penalty() == 0
    features = torch.randn(4, N_TAPS, 2, 32)
    scaled = F.layer_norm(features, (32,), eps=1e-6).flatten(1)
    torch.testing.assert_close(module(features), module.head.classifier(scaled * module.mask))
    mask = module.mask.clone()
    torch.nn.init.normal_(weight)
    module.begin_epoch(5, 6)
    assert torch.equal(module.mask, mask)


@pytest.mark.parametrize(("select_after", "epochs", "first"), [(0.5, 10, 6), (0.0, 10, 2), (0.9, 3, 3), (0.5, 1, None)])
def test_head2toe_selects_after_its_share_of_the_epochs_but_never_before_the_first(select_after, epochs, first):
    module = build_head2toe(spec("pooled"), Head2ToeOptions(select_after=select_after), n_classes=3)
    selected_at = None
    for epoch in range(1, epochs + 1):
        module.begin_epoch(epoch, epochs)
        if selected_at is None and not module.mask.all():
            selected_at = epoch
    assert selected_at == first


def test_the_unit_scaling_of_head2toe_gives_unit_vectors():
    module = build_head2toe(spec("pooled"), Head2ToeOptions(scaling="unit"), n_classes=3)
    features = torch.randn(4, N_TAPS, 2, 32)
    expected = module.head.classifier((features / features.norm(dim=-1, keepdim=True)).flatten(1))
    torch.testing.assert_close(module(features), expected)


def test_the_counts_on_vit_b():
    geometry = Geometry(grid=(14, 14), prefix_tokens=1, channels=768)
    all_taps, outputs = tuple(range(13)), tuple(range(1, 13))
    of = {
        "attentive": (spec(taps=(12,), geometry=geometry), AttentiveOptions(norm="backbone")),
        "head2toe": (spec("pooled", all_taps, geometry), Head2ToeOptions()),
        "ladder": (spec(taps=all_taps, geometry=geometry), LadderOptions(norm="none")),
        "combo": (spec(taps=outputs, geometry=geometry), ComboOptions()),
    }
    counts = {name: ADAPTORS[name].count(*planned, n_classes=10) for name, planned in of.items()}
    # The 2.38 M that are reported of LST, without the head's 7,690; of ComBo's 1.7 M, its MLP's width was inferred.
    assert counts == {"attentive": 623_626, "head2toe": 199_690, "ladder": 2_384_182, "combo": 1_680_266}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("attentive", {"queries": 5}, r"queries=5, reduction=1: their product must divide the tap's 32 channels"),
        ("attentive", {"reduction": 2}, r"queries=32, reduction=2: their product must divide"),
        ("attentive", {"queries": 0}, r"queries=0: it must be 1 or more"),
        ("attentive", {"attend": "cls"}, r"attend=cls: it must be one of patches, all"),
        ("ladder", {"reduction": 16}, r"reduction=16, heads=4: their product must divide the backbone's 32 channels"),
        ("ladder", {"gap": 3}, r"gap=3 does not divide the backbone's depth of 4 blocks"),
        ("ladder", {"temperature": 0}, r"temperature=0.0: it must be above 0 and finite"),
        ("ladder", {"dropout": 1}, r"dropout=1.0: it must be at least 0 and below 1"),
        ("combo", {"width": 9}, r"width=9 must be divisible by heads=2"),
        ("combo", {"hidden": 0}, r"hidden=0: it must be 1 or more"),
        ("combo", {"pool": "tokens"}, r"adaptor combo has no option 'pool'; it knows gap=1, .*"),
        ("head2toe", {"keep": 0}, r"keep=0.0: it must be above 0 and at most 1"),
        ("head2toe", {"keep": "nan"}, r"keep=nan: it must be above 0 and at most 1"),
        ("head2toe", {"lasso": -1}, r"lasso=-1.0: it must be 0 or more, and finite"),
        ("head2toe", {"select_after": 1}, r"select_after=1.0: it must be at least 0 and below 1"),
    ],
)
def test_a_bad_option_of_a_rival_is_named(store, name, settings, message):
    kind = ADAPTORS[name]
    with pytest.raises(OptionError, match=message):
        kind.plan(store, parse_options(kind.options, settings, adaptor=name))


def test_an_adaptor_of_another_module_is_found_by_its_name():
    assert adaptor_kind("coldtap.adaptors.networks.linear:LINEAR") is LINEAR


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:KIND", r"'no_such_module:KIND' cannot be imported \(No module named 'no_such_module'\): give"),
        ("coldtap.adaptors.networks.linear:PROBE", r"cannot be imported \(module .* has no attribute 'PROBE'\)"),
        (":LINEAR", r"':LINEAR' cannot be imported \(Empty module name\)"),
        ("coldtap.adaptors.networks.linear:LinearProbe", r"is a type, not an AdaptorKind"),
    ],
)
def test_what_is_no_adaptor_is_refused(name, message):
    with pytest.raises(OptionError, match=message):
        adaptor_kind(name)


def test_the_documented_example_passes_its_tests(tmp_path):
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    assert [name for name, _ in blocks] == ["mix.py", "test_mix.py"]
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "test_mix.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout), done.stdout
