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
