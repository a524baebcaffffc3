"""Which kernel runs: each is tried against exact integers, and the first right one timed against float32."""

import time
from collections.abc import Callable, Mapping, Sequence
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
from coldtap.pipeline.backbones.torch_state import torch_threads

type KernelOption = Literal["auto", "int", "float"]
KERNEL_OPTIONS: tuple[KernelOption, ...] = get_args(KernelOption.__value__)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """A kernel, and why it was taken."""

    kernel: Kernel
    why: str


type Speed = Callable[[Kernel, Probe, torch.device], float]

INT_MM = IntMmKernel()
# The integer kernels of a kind of device, the preferred one first.
KERNELS: Mapping[str, Sequence[Kernel]] = {"cpu": (OneDnnKernel(), INT_MM), "cuda": (INT_MM,)}


def choose_kernel(
    option: str,
    device: torch.device,
    *,
    convolutions: bool = False,
    kernels: Sequence[Kernel] | None = None,
    speed: Speed | None = None,
) -> KernelChoice:
    """Choose the kernel of an option, or of a kernel's own name.

    `int` takes the first kernel that computes exactly, `onednn` before `int_mm`. `auto` takes that one too, if it beats
    float32, else `float`. No clock stands between two kernels of integers: they differ in the last bits of features,
    which would depend on chance.

    Args:
        option: `auto`, `int`, `float`, or a kernel's name.
        device: where it is to run.
        convolutions: whether the model consists of convolutions; else of linears.
        kernels: of integers, the preferred one first; None for those of the device.
        speed: of a kernel over float32; None to measure it.

    Raises:
        OptionError: no such option.
        MachineError: integers are asked for, and no kernel computes exactly on this machine.
    """
    kernels = KERNELS[device.type] if kernels is None else kernels
    if option == "float":
        return KernelChoice(kernel=FloatKernel(), why="as asked: floats are restored and multiplied")
    if named := [kernel for kernel in kernels if kernel.name == option]:
        if (wrong := flaw_of(named[0], device)) is not None:
            raise MachineError(f"`kernel={option!r}`: {wrong} on this machine; use `kernel='auto'`")
        return KernelChoice(kernel=named[0], why="as asked")
    if option not in KERNEL_OPTIONS:
        raise OptionError(f"`kernel={option!r}`: choose one of {', '.join(KERNEL_OPTIONS)}")
    first, flaws = _first_exact(kernels, device)
    if first is None:
        if option == "int":
            raise MachineError(
                f"`kernel='int'`: no integer kernel computes exactly here ({flaws}); use `kernel='float'`"
            )
        return KernelChoice(kernel=FloatKernel(), why=f"no integer kernel computes exactly here ({flaws})")
    why = f"{first.name} computes exactly" + (f" ({flaws})" if flaws else "")
    if option == "int":
        return KernelChoice(kernel=first, why=why)
    probe = CONVOLUTION if convolutions else LINEAR
    gain = (speed or measure_speed)(first, probe, device)
    why = f"{why}, at {gain:.1f} × the speed of float32 on {probe.name}"
    if gain <= 1:
        return KernelChoice(kernel=FloatKernel(), why=f"{why}: no gain")
    return KernelChoice(kernel=first, why=why)


def _first_exact(kernels: Sequence[Kernel], device: torch.device) -> tuple[Kernel | None, str]:
    """The first kernel without a flaw, if any, and the flaws of those before it."""
    flaws: list[str] = []
    for kernel in kernels:
        if (flaw := flaw_of(kernel, device)) is None:
            return kernel, "; ".join(flaws)
        flaws.append(f"{kernel.name}: {flaw}")
    return None, "; ".join(flaws)


@cache
def flaw_of(kernel: Kernel, device: torch.device) -> str | None:
    """Say what is wrong with a kernel on this machine; None where its integers are exact."""
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
class Probe:
    """Sizes of a product to time."""

    name: str
    values: tuple[int, ...]
    weight: tuple[int, ...]
    window: Window | None


LINEAR = Probe(name="a linear of ViT-B's size", values=(1576, 768), weight=(768, 768), window=None)  # eight images
CONVOLUTION = Probe(
    name="a convolution of ResNet-50's size",
    values=(4, 128, 28, 28),
    weight=(128, 128, 3, 3),
    window=Window(stride=(1, 1), padding=(1, 1), dilation=(1, 1)),
)


@cache
def measure_speed(kernel: Kernel, probe: Probe, device: torch.device) -> float:
    """Measure a kernel, with its inputs quantised, over float32; on the CPU by one thread."""
    product = Product(
        codes=torch.ones(probe.weight, dtype=torch.int8, device=device),
        scale=torch.ones(probe.weight[0], device=device),
        bias=torch.zeros(probe.weight[0], device=device),
        input=ActivationRange(scale=1.0, zero=128),
        window=probe.window,
        then=None,
    )
    values, weight, window = torch.ones(probe.values, device=device), product.codes.float(), probe.window
    integers = kernel.prepare(product)

    def run_float() -> Tensor:
        if window is None:
            return functional.linear(values, weight, product.bias)
        return functional.conv2d(values, weight, product.bias, window.stride, window.padding, window.dilation)

    def run_integers() -> Tensor:
        return integers(product.input.quantise(values, 255))

    # Where cores are busy, threads wait for each other many times longer than a product takes.
    with torch_threads(1):
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
