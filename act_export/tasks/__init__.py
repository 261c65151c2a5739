"""Prompts, answers and scoring: the data that heads are chosen with, and that models are evaluated on."""

from act_export.tasks.encoding import EncodedExample, encode_examples
from act_export.tasks.examples import Example, TaskError, read_examples
from act_export.tasks.language_model import LanguageModel, Session, SessionLanguageModel, TorchLanguageModel
from act_export.tasks.scoring import batches, choice_scores, predicted_choice, score_choices
from act_export.tasks.splits import Splits, split_examples
from act_export.tasks.task import Task, load_examples, load_task, rows_path, task_names

__all__ = [
    "EncodedExample",
    "Example",
    "LanguageModel",
    "Session",
    "SessionLanguageModel",
    "Splits",
    "Task",
    "TaskError",
    "TorchLanguageModel",
    "batches",
    "choice_scores",
    "encode_examples",
    "load_examples",
    "load_task",
    "predicted_choice",
    "read_examples",
    "rows_path",
    "score_choices",
    "split_examples",
    "task_names",
]
