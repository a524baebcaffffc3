"""The backward pass of LAST and MIST: equal to the modules' own one after another, and next to nothing kept for it."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coldtap.adaptors.networks.contract import FeatureSpec
from coldtap.adaptors.networks.last import Last, LastOptions, build_last
from coldtap.adaptors.networks.lsa import function as lsa_groups
from coldtap.adaptors.networks.lsa.attention import LowRankAttention
from coldtap.adaptors.networks.mist import MistOptions, build_mist
from coldtap.stores.format.geometry import Geometry

BATCH, TAPS = 5, 4
GEOMETRY = Geometry(grid=(2, 3), prefix_tokens=1, channels=8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def two_samples_a_part(monkeypatch):
    monkeypatch.setattr(lsa_groups, "CPU_PART_BYTES", 2 * 7 * 8 * 8)  # token, channel, bytes of a float64


def build(name, geometry=GEOMETRY, n_taps=TAPS, **options):
    taps = tuple(range(n_taps)) if name == "last" else (n_taps - 1,)
    gather = "layers" if name == "last" else "sum"
    spec = FeatureSpec(array="any", gather=gather, taps=taps, depth=n_taps - 1, geometry=geometry, final_norm=None)
    build_kind, options_type = {"last": (build_last, LastOptions), "mist": (build_mist, MistOptions)}[name]
    module = build_kind(spec, options_type(norm="none", **options), n_classes=3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module, torch.randn(BATCH, *spec.row_shape)


def one_after_another(module, features):
    """The formula: modules called in turn, plain autograd."""
    if not isinstance(module, Last):
        return module.stack(module.entry(features))
    u = features[:, 0]
    for i, group in enumerate(module.groups, start=1):
        z = features[:, i]
        u = group(u + z) if module.recursion == "B" else group(u) + z
    return u - features[:, :-1].sum(dim=1) if module.bias_correction else u


def gradients(module, features, represent, seed=7):
    torch.manual_seed(seed)  # of what is dropped
    result = represent(module, features)
    towards = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    named = {name: each for name, each in module.named_parameters() if not name.startswith("head")}
    return result.detach(), dict(zip(named, torch.autograd.grad(result, list(named.values()), towards), strict=True))


def worst_difference(module, features):
    """The largest difference of the result and of any gradient, each against the largest number of its tensor."""
    plain, plain_gradients = gradients(module, features, one_after_another)
    result, result_gradients = gradients(module, features, lambda m, x: m.represent(x))
    pairs = [(plain, result), *((plain_gradients[name], result_gradients[name]) for name in plain_gradients)]
    return max(float((a - b).abs().max() / (a.abs().max() + 1e-3)) for a, b in pairs)


SWITCHES = {
    "heads": (1, 2),
    "bias": (False, True),
    "lsa_norm": (True, False),
    "scale": (1.0, 0.5),
    "dropout": (0.0, 0.3),
    "drop_path": (0.0, 0.4),
}
GRID = [dict(zip(SWITCHES, values, strict=True)) for values in itertools.product(*SWITCHES.values())]


@pytest.mark.usefixtures("two_samples_a_part")
@pytest.mark.parametrize(
    ("recursion", "bias_correction", "modules"), [("A", True, 2), ("A", False, 3), ("B", True, 3), ("B", False, 1)]
)
def test_last_has_the_gradients_of_its_modules_one_after_another(recursion, bias_correction, modules):
    for options in GRID:
        module, features = build(
            "last", recursion=recursion, bias_correction=bias_correction, modules=modules, **options
        )
        assert worst_difference(module.double(), features.double()) < 1e-10, options


@pytest.mark.usefixtures("two_samples_a_part")
@pytest.mark.parametrize("entry_norm", [True, False])
def test_mist_has_the_gradients_of_its_modules_one_after_another(entry_norm):
    for options in GRID:
        module, features = build("mist", entry_norm=entry_norm, depth=3, rank=4, **options)
        assert worst_difference(module.double(), features.double()) < 1e-10, options


@pytest.mark.usefixtures("two_samples_a_part")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("last", {"modules": 2}),
        ("last", {"modules": 2, "recursion": "A", "bias": True, "bias_correction": False, "heads": 2}),
        ("last", {"modules": 2, "dropout": 0.3, "drop_path": 0.3, "scale": 0.5}),
        ("mist", {"depth": 3, "rank": 2}),
        ("mist", {"depth": 2, "rank": 2, "bias": True, "entry_norm": False, "lsa_norm": False}),
    ],
)
def test_gradients_equal_finite_differences(name, options):
    module, features = build(name, **options)
    module, features = module.double(), features[:3].double()
    names, parameters = zip(
        *((key, each.detach().requires_grad_()) for key, each in module.named_parameters() if "head" not in key),
        strict=True,
    )

    def represent(*parameters):
        for key, each in zip(names, parameters, strict=True):
            owner, _, attribute = key.rpartition(".")
            # The very tensors, as parameters: gradcheck follows them.
            module.get_submodule(owner)._parameters[attribute] = each
        torch.manual_seed(7)
        return module.represent(features)

    assert torch.autograd.gradcheck(represent, parameters, fast_mode=True)


@pytest.mark.parametrize("start", ["random", "zero-up"])
@pytest.mark.parametrize("name", ["last", "mist"])
def test_float32_differs_by_rounding(name, start):
    # Stated in docs/methods.md: 1e-4 of a tensor's largest number, as far from float64 as the plain way is.
    geometry = Geometry(grid=(4, 4), prefix_tokens=1, channels=64)
    module, features = build(name, geometry, n_taps=13)
    for lsa in (each for each in module.modules() if isinstance(each, LowRankAttention)):
        nn.init.kaiming_uniform_(lsa.down, a=math.sqrt(5))
        nn.init.zeros_(lsa.up) if start == "zero-up" else nn.init.normal_(lsa.up, std=0.1)
    assert worst_difference(module, features) < 1e-4


@pytest.mark.parametrize("name", ["last", "mist"])
def test_massive_channels_cost_no_precision(name):
    # 48 modules, two channels of 1e3 in late taps and not in early ones: an input had back by undoing sums would
    # carry the late taps' rounding into the early groups.
    geometry = Geometry(grid=(4, 4), prefix_tokens=1, channels=64)
    options = {"modules": 4} if name == "last" else {"depth": 48, "entry_norm": False}
    module, features = build(name, geometry, n_taps=13, rank=4, **options)
    for lsa in (each for each in module.modules() if isinstance(each, LowRankAttention)):
        nn.init.kaiming_uniform_(lsa.down, a=math.sqrt(5))
        nn.init.normal_(lsa.norm.weight, mean=1, std=0.1)
    massive = features[:, 6:, 0] if name == "last" else features[:, 0]
    massive[..., :2] += 1e3
    exact, exact_gradients = gradients(module.double(), features.double(), one_after_another)
    module = module.float()

    def errors(represent):
        result, found = gradients(module, features, represent)
        pairs = [(exact, result), *((exact_gradients[key], found[key]) for key in found)]
        return torch.tensor([float((a - b).norm() / a.norm()) for a, b in pairs])

    ours, plain = errors(lambda m, x: m.represent(x)), errors(one_after_another)
    assert ours.max() < 1e-4
    assert ours.median() < 4 * plain.median()


def kept_bytes(module, features):
    """The storages that autograd holds from one end to the other, without parameters and features."""
    owned = {each.untyped_storage().data_ptr() for each in (*module.parameters(), *module.buffers(), features)}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = module.represent(features)
    assert result.requires_grad
    return sum(n_bytes for n_bytes, _ in kept.values())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("noise", [{}, {"dropout": 0.2}, {"drop_path": 0.2}])
@pytest.mark.parametrize(("name", "n_modules"), [("last", 6), ("mist", 6)])
def test_what_is_kept_is_z_and_its_noise(name, n_modules, noise, bias):
    rank = 4
    options = {"modules": 2} if name == "last" else {"depth": 6}
    module, features = build(name, rank=rank, bias=bias, **options, **noise)
    factors = n_modules * BATCH * 7 * (rank + bias)
    drawn = n_modules * BATCH * {"dropout": 7 * rank, "drop_path": 1}.get(next(iter(noise), ""), 0)
    assert kept_bytes(module, features) == 4 * (factors + drawn)


def test_on_vit_b_less_is_kept_than_one_tensor_of_tokens():
    geometry = Geometry(grid=(14, 14), prefix_tokens=1, channels=768)
    module, features = build("last", geometry, n_taps=13)
    features = features[:2]
    one_tensor = 2 * 197 * 768 * 4
    assert kept_bytes(module, features) == 48 * 4 * 2 * 197 * 4 < 0.26 * one_tensor
    plain = 48 * 2 * one_tensor  # a module's input and its norm's output, of which plain autograd keeps both

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = module

        def represent(self, x):
            return one_after_another(self.last, x)

    assert kept_bytes(Plain(), features) > plain


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"drop_path": 0.3}, {"dropout": 0.3, "drop_path": 0.3}])
def test_the_noise_is_that_of_the_modules_one_after_another(options):
    module, features = build("last", modules=2, **options)
    states = []
    for represent in (one_after_another, lambda m, x: m.represent(x)):
        torch.manual_seed(3)
        represent(module, features)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert worst_difference(module.double(), features.double()) < 1e-10


@pytest.mark.parametrize("name", ["last", "mist"])
def test_evaluation_gives_the_same_and_drops_nothing(name):
    module, features = build(name, dropout=0.5)
    module.eval()
    expected = one_after_another(module, features)
    with torch.inference_mode():
        torch.testing.assert_close(module.represent(features), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["last", "mist"])
def test_gradients_to_the_features_are_had_one_module_after_another(name):
    module, features = build(name)
    features.requires_grad_()
    wanted = torch.autograd.grad(one_after_another(module, features).square().sum(), features)
    torch.testing.assert_close(torch.autograd.grad(module.represent(features).square().sum(), features), wanted)


@pytest.mark.parametrize("name", ["last", "mist"])
def test_stacked_networks_train_under_vmap(name):
    trials = [build(name)[0] for _ in range(3)]
    features = build(name)[1]
    targets = torch.tensor([0, 1, 2, 0, 1])
    parameters, buffers = torch.func.stack_module_state(trials)

    def loss(of_trial):
        return F.cross_entropy(torch.func.functional_call(trials[0], (of_trial, buffers), (features,)), targets)

    stacked = torch.func.vmap(torch.func.grad(loss))(parameters)
    batched = torch.autograd.grad(torch.func.vmap(loss)(parameters).sum(), list(parameters.values()))
    for i, trial in enumerate(trials):
        F.cross_entropy(trial(features), targets).backward()
        for (key, parameter), other in zip(trial.named_parameters(), batched, strict=True):
            torch.testing.assert_close(stacked[key][i], parameter.grad, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(other[i], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["last", "mist"])
def test_an_export_sees_the_modules(name):
    module, features = build(name)
    program = torch.export.export(module.eval(), (features,))
    torch.testing.assert_close(program.module()(features), module(features), rtol=1e-4, atol=1e-4)


def test_parts_cover_the_batch_and_are_nearly_equal(monkeypatch):
    monkeypatch.setattr(lsa_groups, "CPU_PART_BYTES", 3 * 7 * 8 * 4)
    parts = [range(11)[part] for part in lsa_groups._parts(torch.empty(11, 4, 7, 8))]
    assert [i for part in parts for i in part] == list(range(11))
    assert sorted(map(len, parts)) == [2, 3, 3, 3]
    monkeypatch.setattr(lsa_groups, "CPU_PART_BYTES", 1)
    assert len(list(lsa_groups._parts(torch.empty(11, 4, 7, 8)))) == 11
