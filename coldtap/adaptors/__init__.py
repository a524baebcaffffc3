"""Small trainable networks that read stored tensors only: LAST, MIST, probes and their rivals. Imports no timm."""

from importlib.util import find_spec

from coldtap.errors import MissingExtraError

# Only torch: what else `coldtap[train]` brings is asked for by the trainings that need it.
if find_spec("torch") is None:
    raise MissingExtraError("coldtap.adaptors needs torch: pip install 'coldtap[train]'")

from coldtap.adaptors.data.batches import Batch, FeatureBatches
from coldtap.adaptors.networks.contract import FeatureSpec
from coldtap.adaptors.networks.kinds import ADAPTORS
from coldtap.adaptors.networks.options import option_defaults
from coldtap.adaptors.runs.load import load_adaptor
from coldtap.adaptors.runs.onnx import OnnxExport, export_onnx
from coldtap.adaptors.runs.record import EpochRecord, RunInfo, SplitMetrics
from coldtap.adaptors.runs.run_folder import read_run
from coldtap.adaptors.training.evaluate import Evaluation, evaluate_adaptor
from coldtap.adaptors.training.grid import expand_grid
from coldtap.adaptors.training.loop import Progress
from coldtap.adaptors.training.options import TrainingOptions
from coldtap.adaptors.training.protocol import ProtocolResult, mean_and_deviation, run_protocol
from coldtap.adaptors.training.runner import TrialResult
from coldtap.adaptors.training.train import RunResult, train_adaptor
from coldtap.adaptors.training.trials import Trials, train_trials, trials_table

__all__ = [
    "ADAPTORS",
    "Batch",
    "EpochRecord",
    "Evaluation",
    "FeatureBatches",
    "FeatureSpec",
    "OnnxExport",
    "Progress",
    "ProtocolResult",
    "RunInfo",
    "RunResult",
    "SplitMetrics",
    "TrainingOptions",
    "TrialResult",
    "Trials",
    "evaluate_adaptor",
    "expand_grid",
    "export_onnx",
    "load_adaptor",
    "mean_and_deviation",
    "option_defaults",
    "read_run",
    "run_protocol",
    "train_adaptor",
    "train_trials",
    "trials_table",
]
