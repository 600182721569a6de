"""Training: the learning-rate schedule, the step, the run and its record."""

from transformer_xl.training.processes import join_processes
from transformer_xl.training.run import Finished, fit_vocabulary, train
from transformer_xl.training.schedule import Schedule
from transformer_xl.training.trainer import Trainer

__all__ = ["Finished", "Schedule", "Trainer", "fit_vocabulary", "join_processes", "train"]
