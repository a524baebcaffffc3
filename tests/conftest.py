"""Settings of the whole suite, and the one process that all its jobs are forked from."""

import pytest
import torch

from tests.helpers.fork_server import ForkServer

# The shipped tests of adaptors and storages explain their failures as the suite's own do.
pytest.register_assert_rewrite("coldtap.adaptors.networks.testing", "coldtap.stores.storage.testing")

# Tiny tensors: a second thread costs more than it brings, and on a busy machine it costs ten times as much.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def server():
    with ForkServer() as running:
        yield running


# They take half a minute to two, and whole files go to a worker: begun last, one of them would run on alone.
LONGEST = (
    "test_workers.py",
    "test_quantise.py",
    "test_job_kill.py",
    "test_benchmarks.py",
    "test_damage.py",
    "test_reader.py",
    "test_job_bad_input.py",
    "test_reference.py",
    "test_trials.py",
    "test_export_backbone.py",
    "test_benchmark.py",
    "test_lora.py",
    "test_train_adaptor.py",
    "test_demo.py",
)


def pytest_collection_modifyitems(items):
    """Let the longest files begin first; `make test` keeps this order (`--no-loadscope-reorder`)."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
