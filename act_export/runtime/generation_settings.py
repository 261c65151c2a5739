"""What a model's generation_config.json asks of generation, applied by transformers' own processors of logits.

Every field is applied, has no effect here, or is named in a note; `USES` says which.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from act_export.errors import SessionError, needs_extras, others_errors, shown

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

_ADVICE = "correct it, or leave these settings out: --ignore-generation-config on the command line"


class Use(Enum):
    """What becomes of a field."""

    APPLIED = "always"
    DRAWING = "where tokens are drawn"
    OTHERWISE = "said otherwise: by arguments, or by the model's file"
    NO_EFFECT = "how transformers computes or what it returns, not which tokens"
    NOT_DONE = "not done here: a note says so"


def _uses() -> dict[str, Use]:
    fields = {
        Use.APPLIED: "bad_words_ids begin_suppress_tokens encoder_no_repeat_ngram_size encoder_repetition_penalty "
        "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id max_time min_length min_new_tokens "
        "no_repeat_ngram_size remove_invalid_values renormalize_logits repetition_penalty sequence_bias stop_strings "
        "suppress_tokens watermarking_config",
        Use.DRAWING: "epsilon_cutoff eta_cutoff min_p temperature top_h top_k top_p typical_p",
        Use.OTHERWISE: "bos_token_id decoder_start_token_id do_sample eos_token_id max_length max_new_tokens "
        "pad_token_id",
        Use.NO_EFFECT: "_from_model_config assistant_confidence_threshold assistant_early_exit "
        "assistant_ensemble_weight assistant_lookbehind cache_config cache_implementation compile_config "
        "continuous_batching_config disable_compile early_stopping is_assistant length_penalty low_memory "
        "max_cache_len max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule output_attentions "
        "output_hidden_states output_logits output_scores prefill_chunk_size prompt_lookup_num_tokens "
        "return_dict_in_generate speculation_type target_lookbehind transformers_version use_cache use_mtp",
        Use.NOT_DONE: "constraints diversity_penalty dola_layers force_words_ids guidance_scale num_beam_groups "
        "num_beams num_return_sequences penalty_alpha token_healing",
    }
    return {name: use for use, names in fields.items() for name in names.split()}


USES: Mapping[str, Use] = _uses()
_CHANGES_NOTHING = {"guidance_scale": 1, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1}


@dataclass(frozen=True)
class GenerationSettings:
    """Fields of a generation configuration.

    Attributes:
        fields: As in generation_config.json.
        source: Where they are from, for messages.
        tokenizer: Of the model; `stop_strings` needs it.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    source: str = "generation_config.json"
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False)

    def but(self, **fields: Any) -> GenerationSettings:
        """With other values for some fields; None leaves a field as it is."""
        return replace(
            self, fields={**self.fields, **{name: value for name, value in fields.items() if value is not None}}
        )

    @property
    def draws(self) -> bool:
        """Whether the configuration asks for drawing tokens."""
        return self.fields.get("do_sample") is True

    def used(self, *, drawing: bool) -> dict[str, Any]:
        """The fields that are applied."""
        wanted = {Use.APPLIED, Use.DRAWING} if drawing else {Use.APPLIED}
        return {name: value for name, value in self.fields.items() if USES.get(name) in wanted and value is not None}

    def notes(self, *, drawing: bool) -> list[str]:
        """What the configuration asks for and doesn't get, a sentence each."""
        notes = []
        left_out = {
            name: value
            for name, value in self.fields.items()
            if USES.get(name) is Use.NOT_DONE and value and value != _CHANGES_NOTHING.get(name)
        }
        if left_out:
            notes.append(f"{self.source} asks for {_listed(left_out)}, which isn't done here: answers may differ")
        if self.draws and not drawing:
            how = {name: self.fields[name] for name in sorted(self.fields) if USES.get(name) is Use.DRAWING}
            how = {name: value for name, value in how.items() if value is not None}
            how_text = f" with {_listed(how)}" if how else ""
            notes.append(f"{self.source} says to draw tokens{how_text}; this is greedy: pass --sample to draw them so")
        return notes

    def rules(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int],
        vocabulary: int,
        drawing: bool,
    ) -> GenerationRules | None:
        """What is to be done for some prompts; None where that is nothing.

        Args:
            input_ids: (batch, sequence), padded on the left.
            attention_mask: The same shape, 0 for padding.
            max_new_tokens: Steps at the most.
            stop_tokens: A sequence ends after one of these.
            vocabulary: Number of logits.
            drawing: Whether tokens are drawn.

        Raises:
            ActExportError: If transformers refuses a value.
            SessionError: If it isn't installed.
        """
        used = self.used(drawing=drawing)
        if not used:
            return None
        with needs_extras(self.source, error=SessionError):
            import torch

        with others_errors(f"the settings of {self.source} can't be applied", _ADVICE):
            config = _configuration(used, stop_tokens, input_ids.shape[1] + max_new_tokens, drawing=drawing)
            stand_in = _stand_in(vocabulary)
            ids = torch.from_numpy(input_ids)
            processors = stand_in._get_logits_processor(
                generation_config=config,
                input_ids_seq_length=input_ids.shape[1],
                encoder_input_ids=ids,
                device="cpu",
                model_kwargs={"attention_mask": torch.from_numpy(attention_mask)},
            )
            criteria = stand_in._get_stopping_criteria(
                generation_config=config, stopping_criteria=[], tokenizer=self.tokenizer
            )
        return GenerationRules(self.source, processors, criteria)


class GenerationRules:
    """Processors of logits and criteria of ending, for a batch of sequences."""

    def __init__(self, source: str, processors: Any, criteria: Any) -> None:
        """Takes transformers' own; use `GenerationSettings.rules`."""
        self._source, self._processors, self._criteria = source, processors, criteria

    def scores(self, input_ids: NDArray[np.int64], logits: NDArray[Any]) -> NDArray[np.float32]:
        """Logits (batch, vocabulary) as they are after all processors.

        Args:
            input_ids: (batch, sequence), with the tokens that were generated.
            logits: (batch, vocabulary).

        Raises:
            ActExportError: If a setting doesn't fit the model.
        """
        import torch

        with others_errors(f"the settings of {self._source} can't be applied", _ADVICE), torch.no_grad():
            scores = self._processors(torch.from_numpy(input_ids), torch.from_numpy(logits.astype(np.float32)))
            return np.asarray(scores.numpy(), np.float32)

    def ended(self, input_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which sequences end, (batch,); arguments and errors as of `scores`."""
        import torch

        with others_errors(f"the settings of {self._source} can't be applied", _ADVICE), torch.no_grad():
            return np.asarray(self._criteria(torch.from_numpy(input_ids), None).numpy(), bool)


def fields_of(config: GenerationConfig | None) -> dict[str, Any]:
    """What a configuration says that isn't transformers' default, as JSON has it."""
    if config is None:
        return {}
    with others_errors("the model's generation configuration can't be written", "correct generation_config.json"):
        found = json.loads(config.to_json_string(use_diff=True, ignore_metadata=True))
    return {name: value for name, value in found.items() if value is not None}


def _configuration(used: Mapping[str, Any], stop_tokens: Collection[int], longest: int, *, drawing: bool) -> Any:
    import torch
    from transformers import GenerationConfig

    from act_export.checkpoint.loader_errors import quiet_transformers

    with quiet_transformers():
        make: Any = GenerationConfig  # whose constructor has no types
        config = make(**used, do_sample=drawing, max_length=longest)
    tokens = sorted(int(token) for token in stop_tokens)
    config._eos_token_tensor = torch.tensor(tokens, dtype=torch.long) if tokens else None
    return config


def _stand_in(vocabulary: int) -> Any:
    """What transformers' own functions ask of a model to make processors and criteria."""
    from transformers import GenerationMixin

    stand_in: Any = object.__new__(GenerationMixin)
    text = SimpleNamespace(vocab_size=vocabulary)
    stand_in.config = SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda *_, **__: text)
    return stand_in


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in fields.items())
