"""What the modules compute, held against numbers by hand and against the formulas written out."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coldtap.adaptors.networks.contract import FeatureSpec, NormSpec, copy_final_norm
from coldtap.adaptors.networks.heads import ClassifierHead, FrozenNorm
from coldtap.adaptors.networks.kinds import ADAPTORS
from coldtap.adaptors.networks.last import LastOptions, build_last
from coldtap.adaptors.networks.linear import LinearOptions, build_linear
from coldtap.adaptors.networks.lsa.attention import LowRankAttention, lsa_parameters
from coldtap.adaptors.networks.mist import MistOptions, build_mist
from coldtap.errors import OptionError
from coldtap.stores import FinalNorm
from coldtap.stores.format.geometry import Geometry
from tests.helpers.synthetic import layer_norm

GEOMETRY = Geometry(grid=(2, 3), prefix_tokens=1, channels=8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def spec(gather="layers", taps=(0, 1, 2, 3), geometry=GEOMETRY, kind="layer_norm"):
    return FeatureSpec(
        array="any", gather=gather, taps=taps, depth=3, geometry=geometry, final_norm=NormSpec(kind=kind, eps=1e-6)
    )


def randomise(module):
    """Moves every parameter away from its start: zero A_O would hide what attention does."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def lsa_by_formula(module, x):
    """Methods 1.1 sentence by sentence, a head at a time."""
    normed = F.layer_norm(x, x.shape[-1:], module.norm.weight, module.norm.bias, 1e-6)
    q, k, v = (normed @ part for part in module.down.split(module.rank, dim=1))
    width = module.rank // module.heads
    heads = [
        torch.softmax(qh @ kh.transpose(1, 2) / width**0.5, dim=-1) @ vh
        for qh, kh, vh in zip(*(part.split(width, dim=-1) for part in (q, k, v)), strict=True)
    ]
    return x + module.scale * torch.cat(heads, dim=-1) @ module.up


@pytest.mark.parametrize(("rank", "heads"), [(1, 1), (4, 1), (6, 3), (8, 2)])
def test_attention_equals_the_formula(rank, heads):
    module = randomise(LowRankAttention(channels=8, rank=rank, heads=heads, scale=0.5)).double()
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(module(x), lsa_by_formula(module, x), rtol=1e-12, atol=1e-12)


def test_attention_by_hand():
    # Two tokens of one channel, no norm, A_Q = A_K = A_V = A_O = 1, r = 1: z = softmax(x xᵀ) x.
    module = LowRankAttention(channels=1, rank=1, norm=False)
    torch.nn.init.ones_(module.down)
    torch.nn.init.ones_(module.up)
    x = torch.tensor([[[0.0], [1.0]]])
    # Token 0: equal weights, 0 + (0 + 1)/2. Token 1: weights 1 : e, 1 + e/(1 + e) = 1.7310586.
    torch.testing.assert_close(module(x), torch.tensor([[[0.5], [1.7310586]]]))


def test_attention_biases_enter_before_the_softmax_and_after_the_product():
    module = randomise(LowRankAttention(channels=8, rank=4, bias=True, scale=2.0)).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    qkv = F.layer_norm(x, (8,), module.norm.weight, module.norm.bias, 1e-6) @ module.down + module.down_bias
    q, k, v = qkv.split(4, dim=-1)
    expected = x + 2 * (torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v @ module.up + module.up_bias)
    torch.testing.assert_close(module(x), expected)


def test_a_fresh_zero_up_module_is_the_identity_and_a_random_one_is_not():
    x = torch.randn(2, 7, 8)
    assert torch.equal(LowRankAttention(channels=8)(x), x)
    assert not torch.equal(LowRankAttention(channels=8, init="random")(x), x)


def test_drop_path_drops_whole_samples_in_training_only():
    module = randomise(LowRankAttention(channels=8, drop_path=0.5))
    x = torch.randn(64, 7, 8)
    whole = module.eval()(x) - x
    dropped = module.train()(x) - x
    kept = (dropped != 0).any(dim=(1, 2))
    assert 15 < kept.sum() < 49
    torch.testing.assert_close(dropped[kept], 2 * whole[kept], rtol=1e-4, atol=1e-5)


def test_dropout_acts_in_training_only():
    module = randomise(LowRankAttention(channels=8, dropout=0.5))
    x = torch.randn(4, 7, 8)
    assert torch.equal(module.eval()(x), module.eval()(x))
    assert not torch.equal(module.train()(x), module.train()(x))


def test_heads_must_divide_the_rank():
    with pytest.raises(OptionError, match=r"rank=4 must be divisible by heads=3"):
        LowRankAttention(channels=8, rank=4, heads=3)


def test_the_papers_parameter_count_on_vit_b():
    assert 48 * lsa_parameters(channels=768, rank=4) == 663_552


@pytest.mark.parametrize(
    ("modules", "rank", "norms", "bias", "expected"),
    [
        (48, 4, 1, False, 663_552),
        (24, 8, 2, False, 663_552),
        (18, 12, 0, False, 663_552),
        (13, 16, 1, False, 658_944),
        (26, 8, 0, True, 659_568),
    ],
)
def test_the_papers_parameter_count_has_several_fits(modules, rank, norms, bias, expected):
    module = LowRankAttention(channels=768, rank=rank, norm=False, bias=bias)
    norm = nn.LayerNorm(768)
    total = modules * (sum(p.numel() for p in module.parameters()) + norms * sum(p.numel() for p in norm.parameters()))
    assert total == expected
    assert round(total / 1e6, 2) == 0.66


@pytest.mark.parametrize(
    ("pool", "expected"),
    [("patch-mean", [4.0]), ("prefix", [10.0]), ("both", [10.0, 4.0]), ("all", [5.5])],
)
def test_pooling_by_hand(pool, expected):
    # One prefix token of 10, patches 3, 4, 5: mean 4, mean of all (10 + 12) / 4.
    head = ClassifierHead(channels=1, n_classes=2, tokens=4, prefix_tokens=1, pool=pool, norm="none")
    tokens = torch.tensor([[[10.0], [3.0], [4.0], [5.0]]])
    with torch.no_grad():
        head.classifier.weight.copy_(torch.eye(2, len(expected)))
    logits = head(tokens)[0, : len(expected)]
    torch.testing.assert_close(logits, torch.tensor(expected))
    torch.testing.assert_close(head.from_pooled(torch.tensor([[[10.0], [4.0]]]))[0, : len(expected)], logits)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("pool", ["patch-mean", "all"])
def test_pooled_features_give_the_logits_of_all_tokens(prefix, pool):
    head = ClassifierHead(channels=8, n_classes=3, tokens=prefix + 6, prefix_tokens=prefix, pool=pool)
    x = torch.randn(4, prefix + 6, 8)
    pooled = torch.cat([x[:, :prefix], x[:, prefix:].mean(1, keepdim=True)], dim=1)
    torch.testing.assert_close(head.from_pooled(pooled), head(x))


def test_the_norm_stands_where_it_is_asked_for():
    x = 3 * torch.randn(2, 7, 8)
    before, after = (
        ClassifierHead(channels=8, n_classes=3, tokens=7, prefix_tokens=1, norm_at=where)
        for where in ("before", "after")
    )
    after.load_state_dict(before.state_dict())
    weight, bias = before.classifier.weight, before.classifier.bias
    torch.testing.assert_close(before(x), F.linear(F.layer_norm(x, (8,), eps=1e-6)[:, 1:].mean(1), weight, bias))
    torch.testing.assert_close(after(x), F.linear(F.layer_norm(x[:, 1:].mean(1), (8,), eps=1e-6), weight, bias))
    assert not torch.allclose(before(x), after(x))


def test_the_backbones_norm_is_copied_used_and_never_trained():
    module = build_linear(spec("pooled", (3,)), LinearOptions(norm="backbone"), n_classes=3)
    norm = layer_norm(8)
    copy_final_norm(module, norm)
    weight, bias = torch.tensor(norm.weight), torch.tensor(norm.bias)
    pooled = torch.randn(4, 1, 2, 8)
    expected = module.head.classifier(F.layer_norm(pooled[:, 0, 1], (8,), weight, bias, 1e-6))
    torch.testing.assert_close(module(pooled), expected)
    assert {"head.norm.weight", "head.norm.bias"} <= set(module.state_dict())
    assert not {"head.norm.weight", "head.norm.bias"} & set(dict(module.named_parameters()))


def test_an_rms_norm_without_bias_is_that():
    norm = FrozenNorm(8, kind="rms_norm", eps=1e-5)
    copy_final_norm(norm, FinalNorm(kind="rms_norm", eps=1e-5, weight=layer_norm(8).weight, bias=None))
    x = torch.randn(3, 8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * torch.tensor(layer_norm(8).weight)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("recursion", ["A", "B"])
def test_last_telescopes_to_the_last_tap_when_increments_are_zero(recursion):
    module = build_last(spec(), LastOptions(recursion=recursion, modules=2, norm="none"), n_classes=3)
    # Whole numbers: float32 adds and subtracts them exactly.
    taps = torch.randint(-1000, 1000, (5, 4, 7, 8)).float()
    assert torch.equal(module.represent(taps), taps[:, -1])


@pytest.mark.parametrize("recursion", ["A", "B"])
def test_last_is_the_last_tap_and_all_increments(recursion):
    module = randomise(build_last(spec(), LastOptions(recursion=recursion, modules=2, norm="none"), n_classes=3))
    module = module.double()
    taps = torch.randn(5, 4, 7, 8, dtype=torch.float64)
    u, increments = taps[:, 0], torch.zeros(5, 7, 8, dtype=torch.float64)
    for i, group in enumerate(module.groups, start=1):
        x = u + taps[:, i] if recursion == "B" else u
        for lsa in group:
            y = lsa_by_formula(lsa, x)
            increments, x = increments + (y - x), y
        u = x if recursion == "B" else x + taps[:, i]
    torch.testing.assert_close(module.represent(taps), taps[:, -1] + increments, rtol=1e-9, atol=1e-9)


def test_the_two_recursions_differ():
    a, b = (build_last(spec(), LastOptions(recursion=form, norm="none"), n_classes=3) for form in "AB")
    b.load_state_dict(randomise(a).state_dict())
    taps = torch.randn(5, 4, 7, 8)
    assert not torch.allclose(a.represent(taps), b.represent(taps), atol=1e-2)


def test_without_its_correction_last_sees_the_sum_of_all_taps():
    options = LastOptions(bias_correction=False, norm="none")
    taps = torch.randint(-1000, 1000, (5, 4, 7, 8)).float()
    assert torch.equal(build_last(spec(), options, n_classes=3).represent(taps), taps.sum(dim=1))


def test_a_fresh_last_is_a_linear_probe_on_the_last_tap():
    last = build_last(spec(), LastOptions(norm="new"), n_classes=3)
    probe = build_linear(spec("layers", (3,)), LinearOptions(norm="new"), n_classes=3)
    probe.head.load_state_dict(last.head.state_dict())
    taps = torch.randn(5, 4, 7, 8)
    torch.testing.assert_close(last(taps), probe(taps[:, 3:]), rtol=1e-4, atol=1e-6)


def test_mist_normalises_its_sum_at_the_entry():
    module = randomise(build_mist(spec("sum", (3,)), MistOptions(depth=2, norm="none"), n_classes=3))
    features = 100 * torch.randn(5, 7, 8)
    x = F.layer_norm(features, (8,), module.entry.weight, module.entry.bias, 1e-6)
    for lsa in module.stack:
        x = lsa_by_formula(lsa, x)
    torch.testing.assert_close(module(features), module.head(x), rtol=1e-4, atol=1e-4)
    assert not isinstance(build_mist(spec("sum", (3,)), MistOptions(norm="new"), n_classes=3).entry, torch.nn.Identity)


def test_the_pilots_parameter_counts():
    # shared/weights/README.md: width 192, ten classes, a new norm in the head.
    geometry = Geometry(grid=(8, 8), prefix_tokens=1, channels=192)
    of = {
        "linear": (spec("pooled", (9,), geometry), LinearOptions(norm="new")),
        "mist": (spec("sum", (9,), geometry), MistOptions(norm="new")),
        "last": (spec("layers", tuple(range(10)), geometry), LastOptions(norm="new", modules=2, rank=8)),
    }
    counts = {name: ADAPTORS[name].count(*planned, n_classes=10) for name, planned in of.items()}
    assert counts == {"linear": 2_314, "mist": 41_866, "last": 119_818}


def test_a_feature_spec_survives_json():
    for features in (spec(), spec("sum", (3,)), dataclasses.replace(spec("pooled", (1,)), final_norm=None)):
        assert FeatureSpec.from_dict(features.to_dict()) == features
