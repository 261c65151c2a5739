"""Some answers before and after calibration, side by side: HTML, in which all that the model said is escaped."""

from __future__ import annotations

import html
import re
from difflib import SequenceMatcher

from act_export.calibration.file import Calibration
from act_export.profile.answer_pair import AnswerPair, AnswerPairs
from act_export.profile.report.document import ran_with
from act_export.profile.report.token_text import running_text
from act_export.profile.sink_profile import SinkProfile

_LONGEST_PROMPT = 600  # characters; of a longer one the end is shown
_WORDS = re.compile(r"\s+|\S+")


def answers_section(profile: SinkProfile, calibration: Calibration | None) -> str:
    """The section; nothing where the profile has no answers, or they are those of another calibration."""
    if profile.answers is None or not ran_with(profile, calibration):
        return ""
    pairs = "\n".join(map(_pair, profile.answers.shown))
    return f"""
<section aria-labelledby="answers">
  <h2 id="answers">Answers before and after</h2>
  <p>{_chosen(profile.answers)} Answers are greedy, and cut off where they grow long; what differs is marked. A few
  prompts are no measure of the gain: the verdict has it.</p>
{pairs}
</section>
"""


def _chosen(answers: AnswerPairs) -> str:
    tried = "the one prompt that was" if answers.tried == 1 else f"the {answers.tried} prompts that were"
    if not answers.differing:
        first = f" These are the first {len(answers.shown)}." if len(answers.shown) > 1 else ""
        return f"Plain and calibrated give the same answer to {tried} tried.{first}"
    are = "is" if answers.differing == 1 else "are"
    return (
        f"Of {tried} tried, {answers.differing} {are} answered otherwise with the calibration; the first of them lead."
    )


def _pair(pair: AnswerPair) -> str:
    plain, calibrated = _marked(pair.plain, pair.calibrated)
    right = f'<p class="note">Right: {html.escape(running_text(pair.right))}</p>' if pair.right else ""
    prompt = running_text(pair.prompt.strip())
    prompt = prompt if len(prompt) <= _LONGEST_PROMPT else f"\N{HORIZONTAL ELLIPSIS}{prompt[-_LONGEST_PROMPT:]}"
    return f"""  <div class="answers">
    <h3>A prompt of {html.escape(pair.source)}</h3>
    <blockquote class="said" dir="auto">{html.escape(prompt)}</blockquote>
    <div class="tokens-pair">
      <div><h4>Plain{_verdict(pair.plain_right)}</h4><p class="said" dir="auto">{plain}</p></div>
      <div><h4>Calibrated{_verdict(pair.calibrated_right)}</h4><p class="said" dir="auto">{calibrated}</p></div>
    </div>
    {right}
  </div>"""


def _verdict(right: bool | None) -> str:
    return "" if right is None else ": right" if right else ": wrong"


def _marked(before: str, after: str) -> tuple[str, str]:
    """Both texts as HTML, with the words marked that the other hasn't; of an empty one a remark."""
    words: list[list[str]] = [_WORDS.findall(running_text(text.strip())) for text in (before, after)]
    marked: tuple[list[str], list[str]] = ([], [])
    for kind, *bounds in SequenceMatcher(None, words[0], words[1], autojunk=False).get_opcodes():
        for said, own, (begin, end) in zip(marked, words, (bounds[:2], bounds[2:]), strict=True):
            text = html.escape("".join(own[begin:end]))
            said.append(f"<mark>{text}</mark>" if kind != "equal" and text else text)
    one, other = ("".join(said) or '<span class="note">(nothing)</span>' for said in marked)
    return one, other
