"""Codes, ranges, kernels and folding: one layer at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coldtap.errors import MachineError, OptionError
from coldtap.pipeline.backbones.integer.kernel_choice import (
    CONVOLUTION,
    KERNELS,
    LINEAR,
    choose_kernel,
    flaw_of,
    measure_speed,
)
from coldtap.pipeline.backbones.integer.kernels import FloatKernel, IntMmKernel, OneDnnKernel
from coldtap.pipeline.backbones.integer.layers import QuantisedLayer
from coldtap.pipeline.backbones.integer.packing import pack, unpack
from coldtap.pipeline.backbones.integer.product import GeluInto
from coldtap.pipeline.backbones.integer.ranges import (
    RANGE_METHODS,
    ActivationRange,
    activation_range,
    weight_codes,
    weight_scales,
)
from coldtap.pipeline.backbones.integer.scheme import SCHEMES, Scheme, SchemeByLayer, parse_override
from coldtap.pipeline.quantisation.ptq.reparameterise import reparameterise
from coldtap.stores.compensation.channel_affine import ChannelAffine
from tests.helpers.kernels import skip_where_inexact

CPU = torch.device("cpu")
INTEGER_KERNELS = (OneDnnKernel(), IntMmKernel())
# A float32 sum of exact products against an exact sum that is scaled once: some steps of float32.
ROUNDING = 1e-5


def linear(n_in=40, n_out=24, *, bias=True):
    torch.manual_seed(0)
    return nn.Linear(n_in, n_out, bias=bias), torch.randn(3, 10, n_in) + 0.3


def convolution(**options):
    torch.manual_seed(0)
    return nn.Conv2d(6, 16, options.pop("kernel", 3), **options), torch.randn(2, 6, 13, 13) - 0.2


LAYERS = {
    "linear": linear(),
    "linear, odd sizes, no bias": linear(37, 13, bias=False),
    "convolution": convolution(padding=1),
    "convolution, strided, dilated": convolution(stride=2, padding=2, dilation=2, bias=False),
    "patches": convolution(kernel=4, stride=4),
    "flat kernel": convolution(kernel=(1, 5), padding=(0, 2), stride=(2, 1)),
}


def quantise(layer, values, scheme, method="least-squares"):
    bits = Scheme.parse(scheme)
    rows = values.movedim(1, -1) if values.ndim == 4 else values
    rows = rows.reshape(-1, rows.shape[-1])
    span = activation_range(rows, float(rows.min()), float(rows.max()), method, bits.largest_activation)
    return QuantisedLayer.of(layer, bits, span, method)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(0, 70), st.integers(0, 2**32))
def test_codes_are_packed_at_their_width_and_come_back(bits, n, seed):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.from_numpy(np.random.default_rng(seed).integers(low, high, (n, 3), endpoint=True).astype(np.int8))
    packed = pack(codes, bits)
    assert len(packed) == -(-n * 3 * bits // 8)
    assert torch.equal(unpack(packed, bits, (n, 3)), codes)


def test_packing_is_as_the_specification_draws_it():
    """Four codes of six bits in three bytes, lowest bits first: 1, −1, 2, −32."""
    packed = pack(torch.tensor([1, -1, 2, -32], dtype=torch.int8), 6)
    assert packed.tolist() == [0b11000001, 0b00101111, 0b10000000]


def test_a_file_with_too_few_bytes_is_refused():
    with pytest.raises(ValueError, match="2 bytes for 4 codes of 6 bits"):
        unpack(torch.zeros(2, dtype=torch.uint8), 6, (4,))


@settings(max_examples=60, deadline=None)
@given(st.floats(-100, 100), st.floats(-100, 100), st.integers(2, 8))
def test_a_range_holds_zero_exactly_and_errs_by_half_a_step(a, b, bits):
    largest = 2**bits - 1
    span = ActivationRange.spanning(min(a, b), max(a, b), largest)
    assert span.restore(span.quantise(torch.zeros(1), largest)) == 0
    values = torch.linspace(min(a, b, 0), max(a, b, 0), 50)
    errors = (span.restore(span.quantise(values, largest)) - values).abs()
    # The zero point is a whole number, so that an end may lie half a step outside.
    assert float(errors.max()) <= span.scale * 1.001 + 1e-30


@pytest.mark.parametrize("scheme", SCHEMES)
def test_least_squares_ranges_lose_no_more_than_percentiles_and_the_whole_range(scheme):
    rows = torch.randn(500, 20) * torch.logspace(-2, 1, 20)
    bits = Scheme.parse(scheme)
    low, high, largest = float(rows.min()), float(rows.max()), bits.largest_activation
    found = {method: activation_range(rows, low, high, method, largest) for method in RANGE_METHODS}
    found["whole"] = ActivationRange.spanning(low, high, largest)
    lost = {
        name: float((span.restore(span.quantise(rows, largest)) - rows).square().sum()) for name, span in found.items()
    }
    assert lost["least-squares"] <= min(lost.values()) * (1 + 1e-6)
    weight = rows.T.contiguous()
    errors = []
    for scales in (
        weight_scales(weight, "least-squares", bits.largest_weight),
        weight.abs().amax(1) / bits.largest_weight,
    ):
        restored = weight_codes(weight, scales, bits.largest_weight) * scales[:, None]
        errors.append((restored - weight).square().sum(1))
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    if scheme == "w4a4":
        assert errors[0].sum() < errors[1].sum() * 0.9


def test_a_weight_of_zeros_has_codes_of_zero():
    for method in RANGE_METHODS:
        scales = weight_scales(torch.zeros(2, 5), method, 7)
        assert (scales > 0).all()
        assert not weight_codes(torch.zeros(2, 5), scales, 7).any()


@pytest.mark.parametrize("kernel", INTEGER_KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_integers_agree_with_the_simulation(kernel, name, scheme):
    skip_where_inexact(kernel)
    layer, values = LAYERS[name]
    quantised = quantise(layer, values, scheme)
    simulated = quantised(values)
    quantised.use(kernel)
    found = quantised(values)
    assert found.shape == layer(values).shape
    assert float((found - simulated).abs().max()) <= ROUNDING * float(simulated.abs().max())


@pytest.mark.parametrize("name", LAYERS)
def test_eight_bits_are_near_the_float_layer_and_four_are_further(name):
    layer, values = LAYERS[name]
    wanted = layer(values).detach()
    errors = [
        float((quantise(layer, values, scheme)(values) - wanted).square().mean() / wanted.var()) for scheme in SCHEMES
    ]
    assert errors[0] < 1e-3
    assert errors == sorted(errors)


@pytest.mark.parametrize("kernel", [FloatKernel(), *INTEGER_KERNELS], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_a_gelu_that_is_fused_gives_the_codes_of_the_next_layer(kernel, approximate, bits):
    skip_where_inexact(kernel)
    layer, values = LAYERS["linear"]
    quantised = quantise(layer, values, "w8a8")
    span = ActivationRange.spanning(-0.17, 1.1, 2**bits - 1)
    wanted = span.quantise(nn.functional.gelu(quantised(values), approximate=approximate), 2**bits - 1)
    quantised.use(kernel, then=GeluInto(approximate=approximate, range=span, largest=2**bits - 1))
    found = quantised(values)
    assert found.dtype == torch.uint8
    assert int(found.max()) <= 2**bits - 1
    difference = (found.int() - wanted.int()).abs()
    assert int(difference.max()) <= 1  # a value between two codes may fall on either
    assert float((difference > 0).float().mean()) < 0.01


@pytest.mark.parametrize("name", LAYERS)
def test_compensation_folds_into_scale_and_bias_and_changes_no_integer(name):
    layer, values = LAYERS[name]
    plain, folded = quantise(layer, values, "w4a4"), quantise(layer, values, "w4a4")
    rng = np.random.default_rng(0)
    affine = ChannelAffine(scale=rng.uniform(0.3, 3, len(layer.weight)), offset=rng.normal(size=len(layer.weight)))
    folded.compensate(affine)
    before, after = plain.product(), folded.product()
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(plain.quantise(values), folded.quantise(values))
    assert before.input == after.input
    assert after.scale.shape == before.scale.shape
    shape = (-1, *(1,) * (values.ndim - 2)) if values.ndim == 4 else (-1,)
    scale, offset = (torch.from_numpy(part).reshape(shape) for part in (affine.scale, affine.offset))
    for kernel in (FloatKernel(), *INTEGER_KERNELS):
        plain.use(kernel)
        folded.use(kernel)
        wanted = plain(values) * scale + offset
        torch.testing.assert_close(folded(values).double(), wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_only_a_layer_without_a_bias_gains_one():
    for bias in (True, False):
        layer, values = linear(bias=bias)
        quantised = quantise(layer, values, "w8a8")
        assert (quantised.product().bias is None) == (not bias)
        quantised.compensate(ChannelAffine.identity(24))
        assert quantised.product().bias.shape == (24,)


def test_a_norm_and_its_reader_are_rewritten_without_a_change_and_their_channels_then_share_a_range():
    torch.manual_seed(0)
    norm, layer, values = nn.LayerNorm(30), nn.Linear(30, 8, bias=False), torch.randn(400, 30)
    with torch.no_grad():
        norm.weight.copy_(torch.logspace(-2, 1, 30))
        norm.bias.copy_(torch.linspace(-3, 3, 30))
        wanted, rows = layer(norm(values)), norm(values)
        moved = reparameterise(norm, layer, rows, 15)
        torch.testing.assert_close(layer(norm(values)), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
        torch.testing.assert_close(norm(values), moved, rtol=0, atol=1e-4)
    spans = [(one.amax(0).clamp(min=0) - one.amin(0).clamp(max=0)) for one in (rows, moved)]
    assert float(spans[0].max() / spans[0].min()) > 20
    assert float(spans[1].max() / spans[1].min()) < 2


# Choosing a kernel.


class SaturatingKernel(OneDnnKernel):
    """What a CPU without VNNI does: sums of two products in 16 bits."""

    name = "onednn"

    def prepare(self, product):
        def run(codes):
            if product.window is not None:
                return OneDnnKernel().prepare(product)(codes)
            pairs = (codes.int() - product.input.zero).unflatten(-1, (-1, 2)).unsqueeze(-3)
            sums = (pairs * product.codes.int().unflatten(-1, (-1, 2))).sum(-1).clamp(-(2**15), 2**15 - 1)
            return sums.sum(-1).float() * product.scale + product.bias

        return run


def test_a_kernel_that_saturates_is_found_out():
    kernels = [SaturatingKernel()]
    choice = choose_kernel("auto", CPU, kernels=kernels)
    assert choice.kernel.name == "float"
    assert choice.why == "no integer kernel computes exactly here (onednn: wrong sums)"
    with pytest.raises(MachineError, match=r"`kernel='int'`: no integer kernel computes exactly here .*wrong sums"):
        choose_kernel("int", CPU, kernels=kernels)
    with pytest.raises(MachineError, match="`kernel='onednn'`: wrong sums on this machine; use `kernel='auto'`"):
        choose_kernel("onednn", CPU, kernels=kernels)


def test_a_kernel_that_is_not_there_is_passed_over():
    class Missing(OneDnnKernel):
        def prepare(self, product):
            raise RuntimeError("no such operator\nand more")

    choice = choose_kernel("int", CPU, kernels=[Missing(), IntMmKernel()])
    assert choice.kernel.name == "int_mm"
    assert choice.why == "int_mm computes exactly (onednn: no such operator)"


class StandIn(IntMmKernel):
    """Exact on any machine, and first in the order."""

    name = "onednn"


class WithoutGelu(StandIn):
    """A build of PyTorch whose operators know one GELU, or none."""

    def __init__(self, *missing):
        self.missing = missing

    def prepare(self, product):
        if product.then is not None and product.then.approximate in self.missing:
            raise RuntimeError("unsupported post op gelu")
        return super().prepare(product)


class NoGelu(StandIn):
    """Hands on the codes of y, not those of its GELU."""

    def prepare(self, product):
        if product.then is None:
            return super().prepare(product)
        run, then = super().prepare(replace(product, then=None)), product.then
        return lambda codes: then.range.quantise(run(codes), then.largest)


class FloatGelu(StandIn):
    """The values that were asked for, but as floats."""

    def prepare(self, product):
        run = super().prepare(product)
        return run if product.then is None else lambda codes: run(codes).float()


class NeedsBias(StandIn):
    """Adds ones where nothing is to be added."""

    def prepare(self, product):
        ones = torch.ones(len(product.codes))
        return super().prepare(replace(product, bias=ones) if product.bias is None else product)


class Undilated(StandIn):
    """Raises at what it cannot do."""

    def prepare(self, product):
        if product.window is not None and product.window.dilation != (1, 1):
            raise RuntimeError("dilation is not supported")
        return super().prepare(product)


FLAWED = {
    "no GELU": (WithoutGelu("none", "tanh"), "unsupported post op gelu"),
    "no GELU by tanh": (WithoutGelu("tanh"), "unsupported post op gelu"),
    "no GELU by erf": (WithoutGelu("none"), "unsupported post op gelu"),
    "GELU left out": (NoGelu(), "wrong codes of a GELU"),
    "GELU in float": (FloatGelu(), "wrong codes of a GELU"),
    "bias out of nowhere": (NeedsBias(), "wrong sums"),
    "no dilation": (Undilated(), "dilation is not supported"),
}


@pytest.mark.parametrize("name", FLAWED)
def test_a_kernel_that_fails_at_one_kind_of_product_is_found_out_before_it_is_used(name):
    flawed, flaw = FLAWED[name]
    choice = choose_kernel("auto", CPU, kernels=[flawed, IntMmKernel()], speed=lambda *_: 2.0)
    assert choice.kernel.name == "int_mm"
    assert choice.why.startswith(f"int_mm computes exactly (onednn: {flaw}), at 2.0 × the speed of float32 on a linear")
    with pytest.raises(MachineError, match=rf"`kernel='int'`: .*exactly here \(onednn: {flaw}\); use `kernel='float'`"):
        choose_kernel("int", CPU, kernels=[flawed])
    with pytest.raises(MachineError, match=f"`kernel='onednn'`: {flaw} on this machine; use `kernel='auto'`"):
        choose_kernel("onednn", CPU, kernels=[flawed])


def test_the_reference_and_int_mm_compute_exactly():
    assert [flaw_of(kernel, CPU) for kernel in (FloatKernel(), IntMmKernel())] == [None, None]


def test_kernels_of_integers_have_an_order_and_no_clock():
    def clocked(kernel, probe, device):
        raise AssertionError(f"{kernel.name} was timed")

    names = {device: [kernel.name for kernel in kernels] for device, kernels in KERNELS.items()}
    assert names == {"cpu": ["onednn", "int_mm"], "cuda": ["int_mm"]}
    exact = [kernel.name for kernel in KERNELS["cpu"] if flaw_of(kernel, CPU) is None]
    choice = choose_kernel("int", CPU, speed=clocked)
    assert choice.kernel.name == exact[0]
    assert choice.why.startswith(f"{exact[0]} computes exactly")


@pytest.mark.parametrize(("convolutions", "kernel"), [(False, "int_mm"), (True, "float")])
def test_a_kernel_that_is_slower_than_float_at_what_the_model_is_made_of_is_not_taken_unasked(convolutions, kernel):
    def speed(kernel, probe, device):
        return 3.0 if probe.window is None else 0.9

    offered = {"convolutions": convolutions, "kernels": [IntMmKernel()], "speed": speed}
    choice = choose_kernel("auto", CPU, **offered)
    assert choice.kernel.name == kernel
    measured = "0.9 × the speed of float32 on a convolution of ResNet-50's size: no gain"
    assert choice.why.endswith(measured if convolutions else "3.0 × the speed of float32 on a linear of ViT-B's size")
    assert choose_kernel("int", CPU, **offered).kernel.name == "int_mm"


def test_speeds_are_measured_and_leave_the_threads_as_they_were():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for probe in (LINEAR, CONVOLUTION):
            assert measure_speed(IntMmKernel(), probe, CPU) > 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_an_unknown_kernel_is_an_option_error():
    with pytest.raises(OptionError, match="`kernel='fast'`: choose one of auto, int, float"):
        choose_kernel("fast", CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", LAYERS)
def test_integers_agree_with_the_simulation_on_a_gpu(name):
    layer, values = LAYERS[name]
    quantised = quantise(layer, values, "w8a8")
    simulated = quantised(values)
    choice = choose_kernel("int", torch.device("cuda"))
    quantised.use(choice.kernel)
    found = quantised.cuda()(values.cuda()).cpu()
    assert float((found - simulated).abs().max()) <= ROUNDING * float(simulated.abs().max())


# Schemes.


def test_schemes_have_names_and_overrides_go_by_the_last_pattern_that_matches():
    assert [str(Scheme.parse(name)) for name in SCHEMES] == list(SCHEMES)
    assert (Scheme.parse("w6a8").largest_weight, Scheme.parse("w4a6").largest_activation) == (31, 63)
    schemes = SchemeByLayer.parse("w4a4", ("blocks.*=w8a8", "blocks.1.*=float", "blocks.1.mlp.*=w6a6"))
    names = ("stem", "blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.mlp.fc1", "blocks.11.attn.qkv", "conv1")
    assert [str(schemes.of(name)) for name in names] == ["w4a4", "w8a8", "None", "w6a6", "w8a8", "w8a8"]
    # A pattern that comes again counts where it comes last.
    again = SchemeByLayer.parse("w4a4", ("patch_embed.*=float", "*=w4a4", "patch_embed.*=w6a6", "*.proj=w4a8"))
    assert [str(again.of(f"patch_embed.{name}")) for name in ("norm", "proj")] == ["w6a6", "w4a8"]


def test_an_override_of_no_layer_is_an_option_error():
    with pytest.raises(
        OptionError, match=r"`overrides='block.0.\*=…'`: no layer has that name; layers are blocks.0.a …"
    ):
        SchemeByLayer.parse("w8a8", ("block.0.*=w4a4",)).require_layers(["blocks.0.a"])


def test_a_range_sees_every_channel():
    """768 values a row: an even step through 2,048 rows of them would meet 48 channels again and again."""
    rows = torch.randn(2048, 768)
    rows[:, 77] += 40
    for method in RANGE_METHODS:
        span = activation_range(rows, float(rows.min()), float(rows.max()), method, 255)
        assert float((span.restore(span.quantise(rows[:, 77], 255)) - rows[:, 77]).abs().mean()) < 0.2


@pytest.mark.parametrize("name", ["w1a8", "w8", "int8", "w9a9", "w8a8 ", ""])
def test_an_unknown_scheme_is_an_option_error(name):
    with pytest.raises(OptionError, match="choose one of w8a8, w6a6, w4a8, w4a4"):
        Scheme.parse(name)


@pytest.mark.parametrize("text", ["blocks", "=w8a8"])
def test_an_override_of_another_form_is_an_option_error(text):
    with pytest.raises(OptionError, match=f"`overrides='{text}'`: expected PATTERN=SCHEME"):
        parse_override(text)
