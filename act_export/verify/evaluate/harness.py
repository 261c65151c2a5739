"""An exported model in lm-evaluation-harness, as its model type `act-onnx`.

The harness knows the model types of its own package only, so this module registers one more and then calls the
harness's own command line: `act-export lm-eval --model act-onnx --model_args path=calibrated.onnx --tasks ...`. From
Python, importing this module is enough.

A continuation is scored as generation would make it: the context is the prompt, and tokens are decoded after it. The
harness's other models read both in one pass; with calibration that would be another model, because sink statistics of
a pass include all its rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lm_eval.models  # noqa: F401  # the harness registers its own model types only into an empty registry
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from act_export.errors import ActExportError
from act_export.runtime import Sampling, Session
from act_export.runtime.chat import render_chat
from act_export.runtime.text import load_tokenizer
from act_export.tasks import EncodedExample
from act_export.tasks.batching import BATCH_SIZE, Batching, default_batch_tokens
from act_export.tasks.generation import generate_answers
from act_export.tasks.language_model import SessionLanguageModel
from act_export.verify.evaluate.continuations import Continuation, passes, score_continuations

MODEL_TYPE = "act-onnx"
_NO_CONTEXT = 2048  # tokens at the most of a model whose file records no context
_MAX_NEW_TOKENS = 256

__all__ = ["MODEL_TYPE", "ActOnnxLM", "run_harness"]


@dataclass(frozen=True)
class _Manner:
    """How answers are generated; requests that agree in it run together."""

    max_new_tokens: int
    until: tuple[str, ...]
    sampling: Sampling


@register_model(MODEL_TYPE)
class ActOnnxLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """An exported model in ONNX Runtime."""

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str | None = None,
        *,
        portable: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = _MAX_NEW_TOKENS,
        threads: int | None = None,
        onnx_device: str = "cpu",
        device: str | None = None,
        trust_remote_code: bool = False,
        **others: object,
    ) -> None:
        """Opens the model. These are the harness's `--model_args`.

        Args:
            path: The exported file, or its folder.
            tokenizer: A folder, hub id or built-in name; None looks beside the file, then where the model came from.
            portable: Run the portable functions, not the native library.
            batch_size: Prompts that run together at the most; None or "auto" for 16.
            max_batch_size: Upper limit of it.
            batch_tokens: Tokens that run together at the most; None leaves it to act-export.
            max_length: Tokens of a sequence at the most; longer contexts are cut on the left. None for the model's.
            max_gen_toks: Tokens of an answer at the most, where the task doesn't say.
            threads: Within an operator; None leaves their number to ONNX Runtime.
            onnx_device: "cpu", "cuda" or "cuda:N": where the model runs.
            device: Of the harness's other models, and a GPU unless it is told otherwise, so it can't mean this one's.
            trust_remote_code: Of data sets and of the tokenizer; the model has no code.
            others: Refused.

        Raises:
            ActExportError: If a value is out of range, the file can't be run, or there is no tokenizer.
        """
        super().__init__()
        if path is None or others:
            problem = f"there is no {', '.join(others)}" if others else "path is missing"
            raise ActExportError(
                f"{problem}; the arguments are path=FILE, tokenizer, portable, onnx_device, max_length and others, "
                f"see the documentation of evaluation"
            )
        self.batch_size = _batch_size(batch_size, max_batch_size)
        self.max_gen_toks = max_gen_toks
        self.session = Session.open(path, native=not portable, threads=threads, device=onnx_device)
        self.tokenizer = load_tokenizer(self.session, tokenizer, trust_remote_code=trust_remote_code)
        self.batch_tokens = batch_tokens or default_batch_tokens(self.tokenizer)
        context = self.session.limits.context
        if max_length is not None and (max_length < 2 or (context is not None and max_length > context)):
            raise ActExportError(
                f"max_length is {max_length}; give 2 to {context or 'any number'}, the model's context"
            )
        self.max_length = max_length or context or _NO_CONTEXT
        self.model = SessionLanguageModel(self.session)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        tokens = (self.tokenizer.eos_token_id, *self.session.limits.stop_tokens)
        return int(next(token for token in tokens if token is not None))

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells its caches apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer does by itself, but none twice."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens).input_ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages in the tokenizer's chat template.

        Raises:
            ActExportError: If it has none, or that fails.
        """
        if not self.tokenizer.chat_template:
            raise ActExportError("the tokenizer has no chat template; leave out --apply_chat_template")
        return render_chat(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        calibration = self.session.calibration
        return {
            "model_source": self.session.properties.get("source", ""),
            "act_export_version": self.session.properties.get("version", ""),
            "calibrated_heads": calibration.num_calibrated_heads if calibration is not None else 0,
            "native": self.session.native,
        }

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the context; see `lm_eval.api.model.LM`."""
        windows = []
        owners = []
        for number, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for number, (log_likelihood, _) in zip(owners, scored, strict=True):
            totals[number] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each context; see `lm_eval.api.model.LM`."""
        alike: dict[_Manner, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(_manner(request.args[1], self.max_gen_toks), []).append(number)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generating") as bar:
            for manner, numbers in alike.items():
                prompts = [self._prompt(requests[number].args[0], manner.max_new_tokens) for number in numbers]
                said = generate_answers(
                    self.model,
                    prompts,
                    Batching(self.batch_size, self.batch_tokens, bar.update),
                    tokenizer=self.tokenizer,
                    max_new_tokens=manner.max_new_tokens,
                    stop=manner.until,
                    stop_tokens=self.session.limits.stop_tokens,
                    sampling=manner.sampling,
                )
                for number, text in zip(numbers, said, strict=True):
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return answers

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._continuation(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(passes(pairs, self.batch_tokens)), disable=disable_tqdm, desc="scoring") as bar:
            batching = Batching(self.batch_size, self.batch_tokens, bar.update)
            scores = score_continuations(self.model, pairs, batching)
        for request, score in zip(requests, scores, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], score)
        return scores

    def _continuation(self, context: Sequence[int], continuation: Sequence[int]) -> Continuation:
        """Both, with the context cut on the left where they are too long; the last token is never an input."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ActExportError(
                f"a continuation has {len(continuation)} tokens; sequences may have {self.max_length}: raise max_length"
            )
        return Continuation(tuple(context[-room:]), tuple(continuation))

    def _prompt(self, context: str, max_new_tokens: int) -> EncodedExample:
        room = self.max_length - max_new_tokens
        if room < 1:
            raise ActExportError(
                f"an answer may have {max_new_tokens} tokens, which leaves no room for the context in {self.max_length}"
                f"; lower max_gen_toks, of the task by --gen_kwargs max_gen_toks=N"
            )
        tokens = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        return EncodedExample(tuple(tokens), (), 0, repr(context[-60:]))


def run_harness(arguments: Sequence[str]) -> None:
    """Runs the harness's command line, with `act-onnx` among its model types.

    Args:
        arguments: Its own, without the program's name.

    Raises:
        ActExportError: If the harness refuses them.
    """
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except (OSError, ValueError) as error:  # the harness reports wrong options and data by these
        raise ActExportError(f"lm-evaluation-harness: {error}") from error
    finally:
        sys.argv = before


def _batch_size(asked: int | str | None, largest: int | None) -> int:
    if asked is None or str(asked).startswith("auto"):
        size = BATCH_SIZE
    elif str(asked).isdecimal() and int(asked) > 0:
        size = int(asked)
    else:
        raise ActExportError(f"batch_size is {asked!r}; give a number, or auto")
    return min(size, largest) if largest else size


def _manner(asked: dict[str, Any], max_new_tokens: int) -> _Manner:
    found = dict(normalize_gen_kwargs(asked, default_max_gen_toks=max_new_tokens))
    if found.get("num_beams") == 1:
        del found["num_beams"]
    known = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
    others = [name for name in found if name not in known]
    if others:
        raise ActExportError(f"{MODEL_TYPE} can't generate with {', '.join(others)}; it takes {', '.join(known)}")
    temperature = float(found.get("temperature") or 0.0) if found["do_sample"] else 0.0
    sampling = Sampling(temperature, int(found.get("top_k") or 0), float(found.get("top_p") or 1.0))
    return _Manner(found["max_gen_toks"], tuple(found["until"]), sampling)
