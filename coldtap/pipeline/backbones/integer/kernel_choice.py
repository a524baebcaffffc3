"""Which kernel runs: each is tried against exact integers, and the first right one timed against float32."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from coldtap.errors import MachineError, OptionError
from coldtap.pipeline.backbones.integer.kernels import FloatKernel, IntMmKernel, Kernel, OneDnnKernel, follow
from coldtap.pipeline.backbones.integer.product import GeluInto, Product, Window
from coldtap.pipeline.backbones.integer.ranges import ActivationRange

type KernelOption = Literal["auto", "int", "float"]
KERNEL_OPTIONS: tuple[KernelOption, ...] = get_args(KernelOption.__value__)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """A kernel, and why it was taken."""

    kernel: Kernel
    why: str


def choose_kernel(option: str, device: torch.device, *, convolutions: bool = False) -> KernelChoice:
    """The kernel of an option, or of a kernel's own name.

    `int` takes the first kernel that computes exactly, `onednn` before `int_mm`. `auto` takes that one too, if it beats
    float32, else `float`. No clock stands between two kernels of integers: they differ in the last bits of features,
    which would depend on chance.

    Args:
        option: `auto`, `int`, `float`, or a kernel's name.
        device: where it is to run.
        convolutions: whether the model consists of convolutions; else of linears.

    Raises:
        OptionError: no such option.
        MachineError: integers are asked for, and no kernel computes exactly on this machine.
    """
    named = _kernels_of(device.type)
    if option == "float":
        return KernelChoice(kernel=FloatKernel(), why="as asked: floats are restored and multiplied")
    if option in named:
        if (wrong := _flaw(option, device)) is not None:
            raise MachineError(f"`kernel={option!r}`: {wrong} on this machine; use `kernel='auto'`")
        return KernelChoice(kernel=named[option], why="as asked")
    if option not in KERNEL_OPTIONS:
        raise OptionError(f"`kernel={option!r}`: choose one of {', '.join(KERNEL_OPTIONS)}")
    first, flaws = _first_exact(device)
    if first is None:
        if option == "int":
            raise MachineError(
                f"`kernel='int'`: no integer kernel computes exactly here ({flaws}); use `kernel='float'`"
            )
        return KernelChoice(kernel=FloatKernel(), why=f"no integer kernel computes exactly here ({flaws})")
    why = f"{first} computes exactly" + (f" ({flaws})" if flaws else "")
    if option == "int":
        return KernelChoice(kernel=named[first], why=why)
    probe = _CONVOLUTION if convolutions else _LINEAR
    speed = _speed(first, probe, device)
    why = f"{why}, at {speed:.1f} × the speed of float32 on {probe.name}"
    if speed <= 1:
        return KernelChoice(kernel=FloatKernel(), why=f"{why}: no gain")
    return KernelChoice(kernel=named[first], why=why)


def _kernels_of(device_type: str) -> dict[str, Kernel]:
    """The integer kernels of a kind of device, the preferred one first."""
    kernels: tuple[Kernel, ...] = (OneDnnKernel(), IntMmKernel()) if device_type == "cpu" else (IntMmKernel(),)
    return {kernel.name: kernel for kernel in kernels}


def _first_exact(device: torch.device) -> tuple[str | None, str]:
    """The first kernel without a flaw, if any, and the flaws of those before it."""
    flaws: list[str] = []
    for name in _kernels_of(device.type):
        if (flaw := _flaw(name, device)) is None:
            return name, "; ".join(flaws)
        flaws.append(f"{name}: {flaw}")
    return None, "; ".join(flaws)


@cache
def _flaw(name: str, device: torch.device) -> str | None:
    """What is wrong with a kernel on this machine; None where its integers are exact."""
    kernel = _kernels_of(device.type)[name]
    try:
        for product, codes in _hard_products(device):
            if not _is_right(kernel.prepare(product)(codes), product, codes):
                return "wrong sums" if product.then is None else "wrong codes of a GELU"
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return str(error).splitlines()[0][:120]
    return None


def _hard_products(device: torch.device) -> list[tuple[Product, Tensor]]:
    """One of each kind that a backbone asks for, and codes for it."""
    strided = Window(stride=(2, 2), padding=(1, 1), dilation=(1, 1))
    patches = Window(stride=(4, 4), padding=(0, 0), dilation=(1, 1))
    dilated = Window(stride=(1, 1), padding=(2, 2), dilation=(2, 2))
    hidden = ActivationRange.spanning(-0.17, 4.0, 255)
    return [
        _hard_product(device, (24, 136)),
        _hard_product(device, (24, 136), bias=False),
        _hard_product(device, (24, 136), then=GeluInto(approximate="none", range=hidden, largest=255)),
        _hard_product(device, (24, 136), then=GeluInto(approximate="tanh", range=hidden, largest=255)),
        _hard_product(device, (24, 8, 3, 3), strided),
        _hard_product(device, (24, 8, 4, 4), patches),
        _hard_product(device, (24, 8, 3, 3), dilated, bias=False),
    ]


def _hard_product(
    device: torch.device,
    shape: tuple[int, ...],
    window: Window | None = None,
    *,
    bias: bool = True,
    then: GeluInto | None = None,
) -> tuple[Product, Tensor]:
    """A product at the largest codes, where 16-bit sums of pairs would saturate, and at random."""
    noise = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (40, 136) if window is None else (2, 8, 12, 12), generator=noise)
    weight = torch.randint(-127, 128, shape, generator=noise)
    codes[0], weight[0], weight[1] = 255, 127, -127
    # Whole numbers; in front of a GELU small ones, so that most fall where it bends.
    scale, biases = (1.0, torch.arange(24.0)) if then is None else (2.0**-16, torch.linspace(-1, 1, 24))
    product = Product(
        codes=weight.to(device, torch.int8),
        scale=torch.full((24,), scale, device=device),
        bias=biases.to(device) if bias else None,
        input=ActivationRange(scale=1.0, zero=37),
        window=window,
        then=then,
    )
    return product, codes.to(device, torch.uint8)


def _is_right(found: Tensor, product: Product, codes: Tensor) -> bool:
    """Whether sums are exact, or each code behind a GELU is the wanted one or next to it."""
    exact, then = _exactly(product, codes), product.then
    if then is None:
        return torch.equal(found.double(), exact)
    wanted = follow(exact, then)
    # Kernels do not round a GELU alike: a value between two codes may fall on either.
    return found.dtype == wanted.dtype and int((found.int() - wanted.int()).abs().max()) <= 1


def _exactly(product: Product, codes: Tensor) -> Tensor:
    """A product of `_hard_products` in float64, where every sum is exact, without what follows."""
    weight = product.codes.double() * product.scale.double().reshape(-1, *(1,) * (product.codes.ndim - 1))
    values, window = codes.double() - product.input.zero, product.window
    bias = None if product.bias is None else product.bias.double()
    if window is None:
        return functional.linear(values, weight, bias)
    return functional.conv2d(values, weight, bias, window.stride, window.padding, window.dilation)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    """Sizes of a product to time."""

    name: str
    values: tuple[int, ...]
    weight: tuple[int, ...]
    window: Window | None


_LINEAR = _Probe(name="a linear of ViT-B's size", values=(1576, 768), weight=(768, 768), window=None)  # eight images
_CONVOLUTION = _Probe(
    name="a convolution of ResNet-50's size",
    values=(4, 128, 28, 28),
    weight=(128, 128, 3, 3),
    window=Window(stride=(1, 1), padding=(1, 1), dilation=(1, 1)),
)


@cache
def _speed(name: str, probe: _Probe, device: torch.device) -> float:
    """Speed of a kernel, with its inputs quantised, over float32; on the CPU of one thread."""
    product = Product(
        codes=torch.ones(probe.weight, dtype=torch.int8, device=device),
        scale=torch.ones(probe.weight[0], device=device),
        bias=torch.zeros(probe.weight[0], device=device),
        input=ActivationRange(scale=1.0, zero=128),
        window=probe.window,
        then=None,
    )
    values, weight, window = torch.ones(probe.values, device=device), product.codes.float(), probe.window
    integers = _kernels_of(device.type)[name].prepare(product)

    def run_float() -> Tensor:
        if window is None:
            return functional.linear(values, weight, product.bias)
        return functional.conv2d(values, weight, product.bias, window.stride, window.padding, window.dilation)

    def run_integers() -> Tensor:
        return integers(product.input.quantise(values, 255))

    with _one_thread():
        turns = [(_seconds(run_float, device), _seconds(run_integers, device)) for _ in range(6)]
    return min(turn[0] for turn in turns) / min(turn[1] for turn in turns)


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """On the CPU, how long the thread worked, not how long it waited: other jobs must not choose the kernel."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    began = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


@contextmanager
def _one_thread() -> Iterator[None]:
    """Where cores are busy, threads wait for each other many times longer than a product takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
