"""Prompts, answers and scoring: the data that heads are chosen with, and that models are evaluated on.

What needs torch is imported from its module: `language_model`, `scoring`, `generation`.
"""

from act_export.tasks.encoding import EncodedExample, encode_examples
from act_export.tasks.examples import Example, Generation, TaskError, TaskExamples, read_examples
from act_export.tasks.questions import DEFAULT_TASK, Questions
from act_export.tasks.sources import rows_path
from act_export.tasks.splits import Splits, prompt_digest, question_digests, split_examples, unused
from act_export.tasks.task import load_examples, load_task, task_names
from act_export.tasks.task_definition import Task

__all__ = [
    "DEFAULT_TASK",
    "EncodedExample",
    "Example",
    "Generation",
    "Questions",
    "Splits",
    "Task",
    "TaskError",
    "TaskExamples",
    "encode_examples",
    "load_examples",
    "load_task",
    "prompt_digest",
    "question_digests",
    "read_examples",
    "rows_path",
    "split_examples",
    "task_names",
    "unused",
]
