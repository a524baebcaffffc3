"""What LAST and MIST keep and take in training, folded into groups against module after module.

    python -m benchmarks.side_memory [--rounds N] [--threads N]

Three figures for each adaptor and geometry: the bytes that autograd keeps from the forward to the backward pass, the
peak of memory above weights and features (a process of its own for each), and the time of a step, both ways in turn in
one process. The features' own bytes stand beside them.
"""

import argparse
import gc
import statistics
import time
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.nn import functional as F

from benchmarks.machine import describe_machine, machine_line, own_process, peak_bytes, resident_bytes
from coldtap.adaptors.networks import last, mist
from coldtap.adaptors.networks.contract import FeatureSpec
from coldtap.adaptors.networks.kinds import ADAPTORS
from coldtap.stores.format.geometry import Geometry

BATCH = 32
DEPTH = {"reference": 9, "ViT-B": 12}
GEOMETRIES = {
    "reference": Geometry(grid=(8, 8), prefix_tokens=1, channels=192),
    "ViT-B": Geometry(grid=(14, 14), prefix_tokens=1, channels=768),
}
CASES = [(name, geometry) for geometry in GEOMETRIES for name in ("mist", "last")]
WAYS = ("module after module", "groups")


def build(name, geometry):
    """An adaptor of default options, and a batch of features."""
    depth, kind = DEPTH[geometry], ADAPTORS[name]
    taps, gather = (tuple(range(depth + 1)), "layers") if name == "last" else ((depth,), "sum")
    spec = FeatureSpec(
        array="any", gather=gather, taps=taps, depth=depth, geometry=GEOMETRIES[geometry], final_norm=None
    )
    torch.manual_seed(0)
    return kind.build(spec, kind.options(norm="new", init="random"), n_classes=10), torch.randn(BATCH, *spec.row_shape)


@contextmanager
def computed(way):
    """Chooses between the two ways."""
    if way == "groups":
        yield
        return
    with patch.object(last, "can_run_groups", lambda _: False), patch.object(mist, "can_run_groups", lambda _: False):
        yield


def step(module, features):
    module.zero_grad()
    F.cross_entropy(module(features), torch.zeros(BATCH, dtype=torch.long)).backward()


def kept_bytes(name, geometry, way):
    """Storages held for the backward pass, without parameters and features."""
    module, features = build(name, geometry)
    owned = {each.untyped_storage().data_ptr() for each in (*module.parameters(), features)}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with computed(way), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module.represent(features)
    return sum(n_bytes for n_bytes, _ in kept.values())


def peak_above(name, geometry, way):
    """Peak of three steps above weights, their gradients and features, in this process."""
    torch.set_num_threads(1)
    small, few = build(name, "reference")
    with computed(way):  # libraries load and allocate at their first use
        small(few[:1]).sum().backward()
    module, features = build(name, geometry)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    before = resident_bytes()
    with computed(way):
        for _ in range(3):
            F.cross_entropy(module(features), torch.zeros(BATCH, dtype=torch.long)).backward()
    return peak_bytes() - before, features.nbytes


def step_seconds(name, geometry, rounds):
    """Medians of the steps' processor time, (way → seconds), and the median of the rounds' ratios."""
    module, features = build(name, geometry)
    taken = {way: [] for way in WAYS}
    for _ in range(rounds + 1):
        for way in WAYS:
            with computed(way):
                start = time.process_time()
                step(module, features)
                taken[way].append(time.process_time() - start)
    plain, groups = (taken[way][1:] for way in WAYS)
    ratios = [ours / theirs for ours, theirs in zip(groups, plain, strict=True)]
    return {way: statistics.median(taken[way][1:]) for way in WAYS}, statistics.median(ratios)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side_memory", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of steps in turn; medians are printed")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print(machine_line(describe_machine()))
    print(f"batches of {BATCH}; {asked.threads} threads; processor time")
    for name, geometry in CASES:
        for way in WAYS:
            with own_process(OMP_WAIT_POLICY="PASSIVE") as process:
                peak, features = process.submit(peak_above, name, geometry, way).result()
            kept = kept_bytes(name, geometry, way)
            print(
                f"{name:5} {geometry:10} {way:20} kept {kept / 1e6:8.2f} MB, peak {peak / 1e6:8.1f} MB above weights "
                f"and {features / 1e6:.1f} MB of features",
                flush=True,
            )
        seconds, ratio = step_seconds(name, geometry, asked.rounds)
        each = ", ".join(f"{way} {value * 1e3:.0f} ms" for way, value in seconds.items())
        print(f"{name:5} {geometry:10} a step: {each}; ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
