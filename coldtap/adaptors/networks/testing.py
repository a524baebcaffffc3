"""The tests that every adaptor must pass: subclass `AdaptorTests`, name the adaptor, give two stores, run pytest.

    class TestMix(AdaptorTests):
        kind = MIX
        settings = ({}, {"first": 3, "pool": "both"})

`docs/adaptors.md` has a whole one. This module needs pytest, and nothing else in coldtap imports it.
"""

import copy
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from coldtap.adaptors.networks.contract import AdaptorKind, EpochAware, FeatureSpec, Penalised, copy_final_norm
from coldtap.adaptors.networks.options import parse_options
from coldtap.errors import MissingFeaturesError
from coldtap.stores import Store

N_CLASSES = 5
N_SAMPLES = 16  # so many that drop-path of a half leaves some of them
EPOCHS = 4


class AdaptorTests:
    """What an adaptor promises by its `AdaptorKind`, as tests.

    They ask for two fixtures, in the class, its module or a conftest: `store`, a small store from which the adaptor
    can be planned with each of the settings, and `poor_store`, one that lacks what the adaptor reads.

    Attributes:
        kind: The adaptor.
        settings: Options as in `--set`, of which every test is run with each; `{}` are the defaults. Give one setting
            at least for each option that changes the parameters or the forward pass, and one that is random if any is.
    """

    kind: ClassVar[AdaptorKind[Any]]
    settings: ClassVar[Sequence[Mapping[str, object]]] = ({},)

    @pytest.fixture(autouse=True)
    def _same_numbers(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test that has a `setting` with each of the settings."""
        if "setting" in metafunc.fixturenames:
            names = [",".join(f"{key}={value}" for key, value in each.items()) or "defaults" for each in self.settings]
            metafunc.parametrize("setting", self.settings, ids=names)

    def test_the_kind_says_what_it_is(self) -> None:
        """A name that `--adaptor` can take, a source, frozen options that say whether they are random, and a rate."""
        assert re.fullmatch(r"[a-z][a-z0-9_-]*", self.kind.name)
        assert self.kind.paper
        assert 0 < self.kind.lr < 1
        assert dataclasses.is_dataclass(self.kind.options)
        options = self.parsed({})
        assert isinstance(options.is_random, bool)
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
            setattr(options, dataclasses.fields(options)[0].name, None)

    def test_options_survive_json_and_text(self, store: Store, setting: Mapping[str, object]) -> None:
        """`run.json` and the command line give back the options that were planned."""
        _, options = self.planned(store, setting)
        fields = dataclasses.asdict(options)
        assert self.parsed(json.loads(json.dumps(fields))) == options
        assert self.parsed({key: str(value) for key, value in fields.items()}) == options

    def test_the_plan_is_in_the_store_and_stays_the_same(self, store: Store, setting: Mapping[str, object]) -> None:
        """The plan names an array and taps that are there, and planned options plan to themselves."""
        spec, options = self.planned(store, setting)
        array = store.arrays[spec.array]
        assert (spec.gather, spec.geometry, spec.depth) == (array.gather, array.geometry, store.depth)
        assert set(spec.taps) <= set(array.taps)
        assert self.kind.plan(store, options) == (spec, options)

    def test_a_store_that_lacks_its_features_is_refused(self, poor_store: Store) -> None:
        """The message names the adaptor and the store."""
        with pytest.raises(MissingFeaturesError, match=re.escape(str(poor_store.storage))) as error:
            self.kind.plan(poor_store, self.parsed(self.settings[0]))
        assert self.kind.name in str(error.value).lower()

    def test_shapes_alone_build_it_and_give_logits(self, store: Store, setting: Mapping[str, object]) -> None:
        """What a run folder keeps is enough to build the network: no store is needed."""
        spec, options = self.planned(store, setting)
        spec = FeatureSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
        module = self.kind.build(spec, self.parsed(dataclasses.asdict(options)), n_classes=N_CLASSES)
        logits = module(features_of(spec))
        per_token = getattr(options, "pool", None) == "tokens"
        patches = (spec.geometry.tokens - spec.geometry.prefix_tokens,) if per_token else ()
        assert logits.shape == (N_SAMPLES, *patches, N_CLASSES)
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()

    def test_the_closed_form_counts_the_parameters(self, store: Store, setting: Mapping[str, object]) -> None:
        """`count` is the number of trainable parameters, whatever the classes."""
        spec, options = self.planned(store, setting)
        for n_classes in (2, N_CLASSES):
            module = self.kind.build(spec, options, n_classes=n_classes)
            counted = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
            assert self.kind.count(spec, options, n_classes=n_classes) == counted

    def test_every_parameter_learns(self, store: Store, setting: Mapping[str, object]) -> None:
        """Away from its start, each parameter has a gradient."""
        spec, module = self.built(store, setting)
        module(features_of(spec)).square().mean().backward()
        idle = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert idle == [], f"without a gradient: {idle}"

    def test_the_state_dict_is_all_there_is(self, store: Store, setting: Mapping[str, object]) -> None:
        """Through safetensors into a fresh network, which then gives the same logits, bit for bit."""
        spec, module = self.built(store, setting)
        self.assert_same_after_round_trip(store, setting, module, spec)

    def test_what_epochs_change_is_in_the_state_dict(self, store: Store, setting: Mapping[str, object]) -> None:
        """A network that changes as training goes on can go on from its state dict; its penalty is a number."""
        spec, module = self.built(store, setting)
        for epoch in range(1, EPOCHS + 1):
            if isinstance(module, EpochAware):
                module.begin_epoch(epoch, EPOCHS)
                self.assert_same_after_round_trip(store, setting, module, spec)
            if isinstance(module, Penalised):
                fresh = self.assert_same_after_round_trip(store, setting, module, spec)
                penalty = module.penalty()
                assert penalty.shape == ()
                assert penalty.isfinite()
                assert isinstance(fresh, Penalised)
                assert torch.equal(penalty, fresh.penalty())

    def test_evaluation_sees_one_sample_at_a_time(self, store: Store, setting: Mapping[str, object]) -> None:
        """In eval mode logits are the same each time, and a sample's do not depend on the others in its batch."""
        spec, module = self.built(store, setting)
        module.eval()
        features = features_of(spec)
        with torch.inference_mode():
            logits = module(features)
            assert torch.equal(module(features), logits)
            others = torch.cat([features[:1], 3 * features_of(spec)[1:]])
            torch.testing.assert_close(module(others)[:1], logits[:1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(module(features[:1]), logits[:1], rtol=1e-4, atol=1e-4)

    def test_only_random_options_make_training_random(self, store: Store, setting: Mapping[str, object]) -> None:
        """In train mode two passes differ if, and only if, the options say so."""
        spec, module = self.built(store, setting)
        features = features_of(spec)
        _, options = self.planned(store, setting)
        assert torch.equal(module(features), module(features)) is not options.is_random

    def test_stacked_networks_are_the_networks(self, store: Store, setting: Mapping[str, object]) -> None:
        """Networks of one shape as one batched computation: the logits and gradients of each alone."""
        if self.kind.cannot_stack:
            pytest.skip(self.kind.cannot_stack)
        spec, options = self.planned(store, setting)
        # Random trials are not stacked to be trained, but can be to be evaluated.
        networks = [self.built(store, setting)[1].double().train(not options.is_random) for _ in range(3)]
        features = features_of(spec).double()
        parameters, buffers = stack_module_state(networks)
        skeleton = copy.deepcopy(networks[0]).to("meta")

        def forward(parameters: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> torch.Tensor:
            logits: torch.Tensor = functional_call(skeleton, (parameters, buffers), (features,))
            return logits

        stacked = vmap(forward)(parameters, buffers)
        alone = torch.stack([network(features) for network in networks])
        torch.testing.assert_close(stacked, alone, rtol=1e-8, atol=1e-8)
        stacked.square().sum().backward()
        alone.square().sum().backward()
        for name, values in parameters.items():
            expected = torch.stack([network.get_parameter(name).grad for network in networks])  # type: ignore[misc]
            assert values.grad is not None
            torch.testing.assert_close(values.grad, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))

    def test_it_can_be_exported_with_a_free_batch(self, store: Store) -> None:
        """`torch.export`, on which ONNX export stands, follows the forward pass without fixing the batch's size."""
        spec, module = self.built(store, self.settings[0])
        free = ({0: torch.export.Dim("batch", min=1)},)
        exported = torch.export.export(module.eval(), (features_of(spec),), dynamic_shapes=free).module()
        few = features_of(spec)[:3]
        torch.testing.assert_close(exported(few), module(few), rtol=1e-4, atol=1e-4)

    def parsed(self, setting: Mapping[str, object]) -> Any:
        """Return the options of a setting."""
        return parse_options(self.kind.options, setting, adaptor=self.kind.name)

    def planned(self, store: Store, setting: Mapping[str, object]) -> tuple[FeatureSpec, Any]:
        """Return what the adaptor reads of the store with a setting, and the options settled."""
        return self.kind.plan(store, self.parsed(setting))

    def built(self, store: Store, setting: Mapping[str, object]) -> tuple[FeatureSpec, nn.Module]:
        """Return the network of a setting, every parameter moved away from its start: zeros would hide what it does."""
        spec, options = self.planned(store, setting)
        module = self.kind.build(spec, options, n_classes=N_CLASSES)
        copy_final_norm(module, store.norm)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=0.3)
        return spec, module

    def assert_same_after_round_trip(
        self, store: Store, setting: Mapping[str, object], module: nn.Module, spec: FeatureSpec
    ) -> nn.Module:
        """Save a network, load it into another one, compare their logits, and return the other."""
        _, fresh = self.built(store, setting)
        fresh.load_state_dict(load(save(module.state_dict())))
        features = features_of(spec)
        with torch.inference_mode():
            assert torch.equal(fresh.eval()(features), module.eval()(features))
        return fresh


def features_of(spec: FeatureSpec) -> torch.Tensor:
    """Some features of a specification: (sample, *row shape), standard normal."""
    return torch.randn(N_SAMPLES, *spec.row_shape)
