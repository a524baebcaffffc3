"""Small trainable networks that read stored tensors only: LAST, MIST, probes. Imports no timm."""

from coldtap.adaptors.batches import Batch, FeatureBatches
from coldtap.adaptors.loading import load_adaptor
from coldtap.adaptors.networks.contract import FeatureSpec
from coldtap.adaptors.networks.kinds import ADAPTORS
from coldtap.adaptors.networks.options import option_defaults
from coldtap.adaptors.run import Progress, RunResult
from coldtap.adaptors.run_folder import EpochRecord, RunInfo, SplitMetrics, read_run
from coldtap.adaptors.training import train_adaptor

__all__ = [
    "ADAPTORS",
    "Batch",
    "EpochRecord",
    "FeatureBatches",
    "FeatureSpec",
    "Progress",
    "RunInfo",
    "RunResult",
    "SplitMetrics",
    "load_adaptor",
    "option_defaults",
    "read_run",
    "train_adaptor",
]
