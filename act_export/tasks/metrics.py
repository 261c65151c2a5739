"""Is a generated answer right? Exact match and F1 over words, as the official SQuAD evaluation defines them.

Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text" (EMNLP 2016), and for questions without
an answer "Know What You Don't Know: Unanswerable Questions for SQuAD" (ACL 2018).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

UNANSWERABLE = "unanswerable"
"""What stands for no answer, in a reference and in what a model says."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """An answer as it is compared: lower case, no ASCII punctuation, no articles, words a space apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references, both normalized; else 0.

    Args:
        prediction: What the model says. `UNANSWERABLE`, or nothing but articles and punctuation, is no answer.
        references: Texts that count as right. Where the question has no answer: none, or `UNANSWERABLE`.
    """
    said = _compared(prediction)
    return float(any(said == reference for reference in _right_answers(references)))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the words of the answer; the best over the references.

    Where the reference or the prediction is no answer, it is 1 if both are, else 0. Arguments as in `exact_match`.
    """
    said = _compared(prediction).split()
    return max(_f1(said, reference.split()) for reference in _right_answers(references))


def _f1(said: Sequence[str], right: Sequence[str]) -> float:
    if not said or not right:
        return float(said == right)
    shared = (Counter(said) & Counter(right)).total()
    return 2 * shared / (len(said) + len(right))


def _right_answers(references: Sequence[str]) -> list[str]:
    """Normalized references; references that are no answer count only where all are."""
    return [text for text in map(_compared, references) if text] or [""]


def _compared(text: str) -> str:
    normalized = normalize_answer(text)
    return "" if normalized == UNANSWERABLE else normalized
