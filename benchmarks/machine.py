"""The machine that measures, processes of their own for what is measured, and the memory that they take."""

import os
import platform
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """What a reader must know beside the numbers."""
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("coldtap", "torch", "timm", "numpy")},
    }


def machine_line(machine: dict[str, Any]) -> str:
    """The same in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    loads = ", ".join(map(str, machine["load"]))
    return (
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, load {loads} (1, 5, 15 min); {versions}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


@contextmanager
def own_process(**environment: str) -> Iterator[Executor]:
    """One fresh process for what is submitted, with variables that libraries read while they are loaded."""
    before = dict(os.environ)
    os.environ.update(environment)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            pool.submit(os.getpid).result()  # so it has started
        finally:
            os.environ.clear()
            os.environ.update(before)
        yield pool


@contextmanager
def paused(*processes: Executor) -> Iterator[None]:
    """Stops processes of their own for a while: their idle threads may spin, and take a core from what is measured."""
    numbers = [process.submit(os.getpid).result() for process in processes]
    try:
        for number in numbers:
            os.kill(number, signal.SIGSTOP)
        yield
    finally:
        for number in numbers:
            os.kill(number, signal.SIGCONT)


def peak_bytes() -> int:
    """The largest resident size that this process had.

    Not `ru_maxrss` where there is another way: that one begins with the peak of the process that started this one.
    """
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """The resident size now; the peak so far where it cannot be had."""
    return _status_bytes("VmRSS") or peak_bytes()


def _status_bytes(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)
