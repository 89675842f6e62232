"""Training: optimizer, learning-rate schedule, averaged weights, checkpoints and the loop."""

from qkd.training.arithmetic.precision import Precision, choose_precision
from qkd.training.averaging import WeightAverage
from qkd.training.checkpoint import CheckpointStore
from qkd.training.evaluate import accuracy
from qkd.training.finite import TrainingError
from qkd.training.job import Batch, FitResult, Job, Partner, Phase, Step, StepResult
from qkd.training.loop import Trainer, fit
from qkd.training.optimizer import build_optimizer, learning_rate
from qkd.training.precision import cpu_threads
from qkd.training.supervised import supervised_step

__all__ = [
    "Batch",
    "CheckpointStore",
    "FitResult",
    "Job",
    "Partner",
    "Phase",
    "Precision",
    "Step",
    "StepResult",
    "Trainer",
    "TrainingError",
    "WeightAverage",
    "accuracy",
    "build_optimizer",
    "choose_precision",
    "cpu_threads",
    "fit",
    "learning_rate",
    "supervised_step",
]
