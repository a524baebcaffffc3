"""How much memory this process may still take, and how much it has taken."""

import resource
from dataclasses import dataclass
from pathlib import Path

# The share of the free memory that resident features may take: the rest is for the network, its activations, and
# for whatever else runs on the machine.
RESIDENT_SHARE = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """Whether features are kept in memory, where, and why.

    `n_bytes` is their size as stored. `on_gpu` says that they are kept in a GPU's memory, not in RAM.
    """

    resident: bool
    n_bytes: int
    reason: str
    on_gpu: bool = False


def decide_residency(n_bytes: int, *, ram_bytes: int, gpu_bytes: int = 0, asked: bool | None = None) -> Residency:
    """Decide whether features are read once and kept, on the GPU or in RAM, or read anew for every batch.

    Args:
        n_bytes: Size of the features as stored.
        ram_bytes: Memory that this process may still take.
        gpu_bytes: Free memory of the GPU that trains; 0 where the CPU does.
        asked: The user's own decision, if there is one: to keep them, or not to.
    """
    size = f"{n_bytes / 1e6:.1f} MB of features"
    if asked is False:
        return Residency(resident=False, n_bytes=n_bytes, reason=f"read batch by batch, as asked: {size}")
    for free, place in ((gpu_bytes, "on the GPU"), (ram_bytes, "in memory")):
        limit = int(RESIDENT_SHARE * free)
        allowed = f"{limit / 1e6:.0f} MB allowed ({RESIDENT_SHARE:.0%} of free memory)"
        if n_bytes <= limit:
            kept = f"kept {place}: {size}, {allowed}"
            return Residency(resident=True, n_bytes=n_bytes, reason=kept, on_gpu=place == "on the GPU")
    if asked:
        return Residency(resident=True, n_bytes=n_bytes, reason=f"kept in memory, as asked: {size}, {allowed}")
    return Residency(resident=False, n_bytes=n_bytes, reason=f"read batch by batch: {size}, {allowed}")


def available_memory_bytes() -> int:
    """Return the bytes this process may still take: the least of free RAM, its control group and its own limit."""
    return max(0, min(_free_ram_bytes(), _control_group_bytes(), _own_limit_bytes()))


def peak_memory_bytes() -> int:
    """Return the largest resident size that this program ever had."""
    try:
        # ru_maxrss begins with the peak of the process that started this one; VmHWM begins anew.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _free_ram_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 4 * 2**30  # no /proc (macOS): a cautious figure
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _control_group_bytes(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """What the tightest limit on this process's control group, or on one above it, leaves (cgroup v1 and v2)."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return 2**62
    left = 2**62
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, limit, used = mount / path.lstrip("/"), "memory.max", "memory.current"
        elif controllers == "memory":
            folder, limit, used = mount / "memory" / path.lstrip("/"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        for group in (folder, *folder.parents):
            left = min(left, _left_in_group(group, limit, used))
    return left


def _left_in_group(group: Path, limit: str, used: str) -> int:
    try:
        maximum = (group / limit).read_text().strip()
        taken = int((group / used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 2**62
    # The page cache counts as taken, and the kernel gives it back when it is asked.
    cache = sum(int(stat.get(name, 0)) for name in ("active_file", "inactive_file"))
    return 2**62 if maximum == "max" else int(maximum) - taken + cache


def _own_limit_bytes() -> int:
    """What `ulimit -v` leaves; the address space in use is not subtracted, the resident share covers it."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return 2**62 if limit == resource.RLIM_INFINITY else limit
