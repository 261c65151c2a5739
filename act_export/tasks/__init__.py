"""Prompts, answers and scoring: the data that heads are chosen with, and that models are evaluated on."""

from act_export.tasks.encoding import EncodedExample, encode_examples
from act_export.tasks.examples import Example, Generation, TaskError, TaskExamples, read_examples
from act_export.tasks.language_model import LanguageModel, RunsModel, SessionLanguageModel, TorchLanguageModel
from act_export.tasks.scoring import ScoringError, batches, choice_scores, predicted_choice, score_choices
from act_export.tasks.splits import Splits, prompt_digest, question_digests, split_examples, unused
from act_export.tasks.task import Task, TaskOptions, load_examples, load_questions, load_task, rows_path, task_names

__all__ = [
    "EncodedExample",
    "Example",
    "Generation",
    "LanguageModel",
    "RunsModel",
    "ScoringError",
    "SessionLanguageModel",
    "Splits",
    "Task",
    "TaskError",
    "TaskExamples",
    "TaskOptions",
    "TorchLanguageModel",
    "batches",
    "choice_scores",
    "encode_examples",
    "load_examples",
    "load_questions",
    "load_task",
    "predicted_choice",
    "prompt_digest",
    "question_digests",
    "read_examples",
    "rows_path",
    "score_choices",
    "split_examples",
    "task_names",
    "unused",
]
