"""Settings of the whole suite."""

import torch

# Tiny tensors: a second thread costs more than it brings, and on a busy machine it costs ten times as much.
torch.set_num_threads(1)
