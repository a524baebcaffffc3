"""Kernels: ways to run an integer product, each tried against exact integers before it is used.

`onednn` is oneDNN's quantised linear and convolution (VNNI on x86), with scales, bias and GELU in the same pass.
`int_mm` is `torch._int_mm`, on CUDA and where oneDNN is not. `float` restores floats and multiplies those: the
reference, which runs anywhere and is no faster than an unquantised backbone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional

from coldtap.pipeline.quantisation.product import GeluInto, Product, Window
from coldtap.pipeline.quantisation.ranges import ActivationRange
from coldtap.stores.errors import MachineError, OptionError

type KernelOption = Literal["auto", "int", "float"]
KERNEL_OPTIONS: tuple[KernelOption, ...] = get_args(KernelOption.__value__)

type Run = Callable[[Tensor], Tensor]


class Kernel(Protocol):
    """A way to run a product."""

    name: str

    def prepare(self, product: Product) -> Run:
        """What takes codes, uint8 (…, in) or (batch, in, height, width), to y, or to the codes of what follows."""


class FloatKernel:
    """Restores the floats that the codes stand for, and multiplies them in float32."""

    name = "float"

    def prepare(self, product: Product) -> Run:
        """As `Kernel`."""
        weight = product.codes.float() * product.scale.reshape(-1, *(1,) * (product.codes.ndim - 1))
        window = product.window

        def run(codes: Tensor) -> Tensor:
            values = product.input.restore(codes)
            if window is None:
                return _follow(functional.linear(values, weight, product.bias), product.then)
            y = functional.conv2d(values, weight, product.bias, window.stride, window.padding, window.dilation)
            return _follow(y, product.then)

        return run


def _follow(y: Tensor, then: GeluInto | None) -> Tensor:
    if then is None:
        return y
    return then.range.quantise(functional.gelu(y, approximate=then.approximate), then.largest)


class OneDnnKernel:
    """oneDNN, through the operators that PyTorch's own quantisation compiles to; CPU only."""

    name = "onednn"

    def prepare(self, product: Product) -> Run:
        """As `Kernel`."""
        ops, window = torch.ops.onednn, product.window
        x, then = product.input, product.then
        zeros = torch.zeros(len(product.codes), dtype=torch.int32)
        after: tuple[Any, ...]
        if then is None:
            after = (1.0, 0, torch.float32, "none", [], "")
        else:
            after = (then.range.scale, then.range.zero, torch.uint8, "gelu", [], then.approximate)
        largest = 255 if then is None else then.largest
        if window is None:
            packed = ops.qlinear_prepack(product.codes.contiguous(), None)

            def run(codes: Tensor) -> Tensor:
                y: Tensor = ops.qlinear_pointwise(
                    codes, x.scale, x.zero, packed, product.scale, zeros, product.bias, *after
                )
                return y if largest == 255 else y.clamp_(max=largest)

            return run
        assert then is None, "convolutions are followed by nothing"
        geometry = [*map(list, (window.stride, window.padding, window.dilation)), 1]
        packed = ops.qconv_prepack(product.codes, product.scale, x.scale, x.zero, *geometry, None)

        def convolve(codes: Tensor) -> Tensor:
            y: Tensor = ops.qconv2d_pointwise(
                codes, x.scale, x.zero, packed, product.scale, zeros, product.bias, *geometry, *after
            )
            return y

        return convolve


class IntMmKernel:
    """`torch._int_mm`: signed codes, products summed in int32; the zero point comes in by the sums of the weights."""

    name = "int_mm"

    def prepare(self, product: Product) -> Run:
        """As `Kernel`."""
        n_out = len(product.codes)
        weight = product.codes.reshape(n_out, -1).t()  # (in, out), column-major as cuBLAS wants it
        k = weight.shape[0]
        # cuBLAS takes multiples of eight; a code of zero adds nothing.
        weight = functional.pad(weight.t(), (0, -k % 8, 0, -n_out % 8)).contiguous().t()
        shift = (128 - product.input.zero) * weight.sum(0, dtype=torch.int32)
        scale, window = product.input.scale * product.scale, product.window

        def run(codes: Tensor) -> Tensor:
            rows, shape = (codes, codes.shape[:-1]) if window is None else _patches(codes, product)
            signed = (rows.reshape(-1, k).to(torch.int16) - 128).to(torch.int8)
            n_rows = len(signed)
            signed = functional.pad(signed, (0, -k % 8, 0, max(0, 17 - n_rows)))  # cuBLAS takes more than 16 rows
            y = (torch._int_mm(signed, weight) + shift)[:n_rows, :n_out].float() * scale
            y = (y if product.bias is None else y + product.bias).reshape(*shape, n_out)
            return _follow(y if window is None else y.permute(0, 3, 1, 2), product.then)

        return run


def _patches(codes: Tensor, product: Product) -> tuple[Tensor, tuple[int, ...]]:
    """What each pixel of the output sees, (batch, height, width, in · kernel), and those first three sizes."""
    window = product.window
    assert window is not None
    (top, left), (down, right), (high, wide) = window.padding, window.stride, window.dilation
    codes = functional.pad(codes, (left, left, top, top), value=product.input.zero)
    height, width = product.codes.shape[2:]
    seen = codes.unfold(2, (height - 1) * high + 1, down).unfold(3, (width - 1) * wide + 1, right)
    seen = seen[..., ::high, ::wide].permute(0, 2, 3, 1, 4, 5)
    return seen.reshape(*seen.shape[:3], -1), tuple(seen.shape[:3])


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """A kernel, and why it was taken."""

    kernel: Kernel
    why: str


def choose_kernel(option: str, device: torch.device) -> KernelChoice:
    """The kernel of an option, or of a kernel's own name.

    `auto` takes the fastest kernel that computes exactly and beats float32 on a linear of ViT-B's size; else `float`.
    `int` takes the fastest that computes exactly.

    Raises:
        OptionError: no such option.
        MachineError: integers are asked for, and no kernel computes exactly on this machine.
    """
    named = _kernels_of(device.type)
    if option == "float":
        return KernelChoice(kernel=FloatKernel(), why="as asked: floats are restored and multiplied")
    if option in named:
        if (wrong := _flaw(option, device)) is not None:
            raise MachineError(f"--kernel {option}: {wrong} on this machine; use --kernel auto")
        return KernelChoice(kernel=named[option], why="as asked")
    if option not in KERNEL_OPTIONS:
        raise OptionError(f"--kernel {option}: choose one of {', '.join(KERNEL_OPTIONS)}")
    flaws = {name: _flaw(name, device) for name in named}
    exact = [name for name, flaw in flaws.items() if flaw is None]
    said = "; ".join(f"{name}: {flaw}" for name, flaw in flaws.items() if flaw)
    if not exact:
        if option == "int":
            raise MachineError(f"--kernel int: no integer kernel computes exactly here ({said}); use --kernel float")
        return KernelChoice(kernel=FloatKernel(), why=f"no integer kernel computes exactly here ({said})")
    speeds = _speeds(device, tuple(exact))
    best = max(exact, key=speeds.__getitem__)
    measured = f"{best} computes exactly, at {speeds[best]:.1f} × the speed of float32 on a linear of ViT-B's size"
    if option == "auto" and speeds[best] <= 1:
        return KernelChoice(kernel=FloatKernel(), why=f"{measured}: no gain")
    return KernelChoice(kernel=named[best], why=measured)


def _kernels_of(device_type: str) -> dict[str, Kernel]:
    kernels: tuple[Kernel, ...] = (OneDnnKernel(), IntMmKernel()) if device_type == "cpu" else (IntMmKernel(),)
    return {kernel.name: kernel for kernel in kernels}


@cache
def _flaw(name: str, device: torch.device) -> str | None:
    """What is wrong with a kernel on this machine; None where its integers are exact."""
    kernel = _kernels_of(device.type)[name]
    try:
        for product, codes in _hard_products(device):
            if not torch.equal(kernel.prepare(product)(codes).long(), _exactly(product, codes)):
                return "wrong sums"
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return str(error).splitlines()[0][:120]
    return None


def _hard_products(device: torch.device) -> list[tuple[Product, Tensor]]:
    """A linear and two convolutions at the largest codes, where 16-bit sums of pairs would saturate, and at random."""
    noise = torch.Generator().manual_seed(0)
    found = []
    for shape, window in (
        ((24, 136), None),
        ((24, 8, 3, 3), Window(stride=(2, 2), padding=(1, 1), dilation=(1, 1))),
        ((24, 8, 4, 4), Window(stride=(4, 4), padding=(0, 0), dilation=(1, 1))),
    ):
        codes = torch.randint(0, 256, (40, 136) if window is None else (2, 8, 12, 12), generator=noise)
        weight = torch.randint(-127, 128, shape, generator=noise)
        codes[0], weight[0], weight[1] = 255, 127, -127
        product = Product(
            codes=weight.to(device, torch.int8),
            scale=torch.ones(24, device=device),
            bias=torch.arange(24.0, device=device),
            input=ActivationRange(scale=1.0, zero=37),
            window=window,
            then=None,
        )
        found.append((product, codes.to(device, torch.uint8)))
    return found


def _exactly(product: Product, codes: Tensor) -> Tensor:
    """The product of `_hard_products` in float64, where every sum is exact."""
    values, weight = codes.double() - product.input.zero, product.codes.double()
    assert product.bias is not None
    if product.window is None:
        return functional.linear(values, weight, product.bias.double()).long()
    window = product.window
    return functional.conv2d(values, weight, product.bias.double(), window.stride, window.padding).long()


@cache
def _speeds(device: torch.device, names: tuple[str, ...]) -> dict[str, float]:
    """Speed of each kernel over a float32 product of the same size: (1576, 768) by (768, 768), eight ViT-B images."""
    weight = torch.randint(-127, 128, (768, 768), device=device).to(torch.int8)
    product = Product(
        codes=weight,
        scale=torch.ones(768, device=device),
        bias=torch.zeros(768, device=device),
        input=ActivationRange(scale=1.0, zero=128),
        window=None,
        then=None,
    )
    values, float_weight = torch.randn(1576, 768, device=device), weight.float()
    baseline = _seconds(lambda: functional.linear(values, float_weight, product.bias), device)
    speeds = {}
    for name in names:
        run = _kernels_of(device.type)[name].prepare(product)
        speeds[name] = baseline / _seconds(lambda run=run: run(product.input.quantise(values, 255)), device)  # type: ignore[misc]
    return speeds


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """The least of a few runs."""
    least = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - began)
    return least
