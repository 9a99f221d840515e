"""Callbacks for any Trainer and strategy.

trainer.callbacks:
  - lightning_dualpipe.callbacks.Throughput       tokens per second
  - lightning_dualpipe.callbacks.ExpertLoad       how even the load of the experts is
  - lightning_dualpipe.callbacks.PeakMemory       the most memory that any rank has held
  - lightning_dualpipe.callbacks.WeightAverage    a moving average of the weights, in host memory
  - lightning_dualpipe.callbacks.NonFiniteGuard   no NaN and no infinity gets into the weights
  - lightning_dualpipe.callbacks.LossSpikeGuard   nor the gradients of a loss that jumps
  - lightning_dualpipe.callbacks.SaveOnSigterm    a checkpoint before the machine is taken away
  - lightning_dualpipe.callbacks.RunReport        pictures at the end, and where everything is
  - lightning_dualpipe.callbacks.StepTimeline     one step of every rank, measured beside simulated
"""

from lightning_dualpipe.callbacks.expert_load import ExpertLoad
from lightning_dualpipe.callbacks.loss_spike_guard import LossSpikeGuard
from lightning_dualpipe.callbacks.nonfinite_guard import NonFiniteGuard
from lightning_dualpipe.callbacks.peak_memory import PeakMemory
from lightning_dualpipe.callbacks.run_report import RunReport
from lightning_dualpipe.callbacks.save_on_sigterm import SaveOnSigterm
from lightning_dualpipe.callbacks.step_timeline import StepTimeline
from lightning_dualpipe.callbacks.throughput import Throughput
from lightning_dualpipe.callbacks.weight_average import WeightAverage

__all__ = [
    "ExpertLoad",
    "LossSpikeGuard",
    "NonFiniteGuard",
    "PeakMemory",
    "RunReport",
    "SaveOnSigterm",
    "StepTimeline",
    "Throughput",
    "WeightAverage",
]
