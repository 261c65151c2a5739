"""The text tower of a vision-language model, as a causal language model.

The tower is the part that attends and writes: token embeddings, decoder layers and the output matrix. The vision
encoder stays where it is; what it makes of an image reaches the tower as embeddings, in place of those of placeholder
tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from act_export.checkpoint.low_memory import is_low_memory
from act_export.errors import ActExportError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

IMAGES_AS_EMBEDDINGS = ("llava", "qwen2_5_vl", "qwen2_vl")
"""Families whose images reach the tower as embeddings and positions alone, and are attended to causally."""

_OTHERWISE = {
    "gemma3": "tokens of an image attend to each other in both directions",
    "mllama": "images enter through cross-attention",
    "paligemma": "the whole prompt attends in both directions",
    "qwen3_vl": "features of an image are added in several layers (deepstack)",
    "qwen3_vl_moe": "features of an image are added in several layers (deepstack)",
}
_TOWERS = ("language_model", "text_model")
_PLACEHOLDERS = tuple(f"{kind}_token_{name}" for kind in ("image", "video", "audio") for name in ("id", "index"))
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}  # of the largest logit


class TextTower(PreTrainedModel):  # type: ignore[no-untyped-call]  # transformers registers it
    """Decoder and output matrix of a vision-language model, which stay the model's own modules.

    Attributes:
        family: Model type of the whole, e.g. "qwen2_vl".
        whole_config: Configuration of the whole.
        placeholders: Token ids that stand for images, videos or sound, in whose place their embeddings go.
    """

    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, whole: PreTrainedModel) -> None:
        """Takes the vision-language model.

        Raises:
            ActExportError: If it has no text tower that stands alone.
        """
        decoder, head = _decoder(whole), _head(whole)
        super().__init__(decoder.config)
        self.model = decoder
        self.lm_head = head
        self.generation_config = whole.generation_config
        self.family = str(whole.config.model_type)
        self.whole_config = whole.config
        self.placeholders = _placeholders(whole.config)
        self._has_m_rope = any(_is_m_rope(module) for module in decoder.modules())

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> _Outputs:
        """As a causal language model of transformers; `position_ids` are the decoder's own.

        Args:
            input_ids: (batch, sequence), or None with `inputs_embeds`.
            attention_mask: (batch, past + sequence).
            position_ids: (batch, sequence); with M-RoPE also (3, batch, sequence).
            inputs_embeds: (batch, sequence, hidden size).
            past_key_values: The cache.
            use_cache: Whether to fill one.
            logits_to_keep: Number of last positions to compute logits for; 0 for all.
            others: For the decoder.
        """
        if position_ids is not None and position_ids.ndim == 2 and self._has_m_rope:
            position_ids = position_ids[None]  # which the rotary embedding repeats
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{name: past_key_values},
            **others,
        ).last_hidden_state
        return _Outputs(self.lm_head(hidden[:, -logits_to_keep:]))

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's."""
        found: nn.Module = self.model.get_input_embeddings()
        return found

    def get_output_embeddings(self) -> nn.Module:
        """The output matrix."""
        found: nn.Module = self.lm_head
        return found

    def set_attn_implementation(self, *arguments: Any, **others: Any) -> None:
        """The decoder's, which shares its configuration."""
        self.model.set_attn_implementation(*arguments, **others)


class _Outputs:
    """What the tower returns: logits (batch, positions, vocabulary)."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def loader_of(config: PreTrainedConfig) -> Any:
    """The class of transformers that loads a configuration's model: one for images and text, or for text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    sees = has_text_tower(config) and type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def check_vision_configuration(config: Mapping[str, Any], name: str) -> None:
    """Refuses a vision-language model's config.json that doesn't say what its vision encoder is.

    Raises:
        ActExportError: transformers would make one up.
    """
    if not config.get("vision_config"):
        raise ActExportError(
            f"config.json of {name}, a {config.get('model_type')} model, has no vision_config; copy the config.json "
            f"that came with the weights"
        )


def has_text_tower(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a vision-language model, with one of its own for the text."""
    return hasattr(config, "vision_config") and getattr(config, "text_config", None) is not None


def text_tower(whole: PreTrainedModel, name: str) -> TextTower:
    """The text tower, after a proof on a few tokens that it computes what the whole does with text.

    Args:
        whole: The vision-language model, in evaluation mode.
        name: Of the checkpoint, for errors.

    Raises:
        ActExportError: If there is none, or it computes something else.
    """
    tower = TextTower(whole)
    tower.train(False)
    ids = torch.tensor([_text_tokens(tower)], device=tower.device)
    mask = torch.ones_like(ids)
    try:
        with torch.no_grad():
            expected = whole(input_ids=ids, attention_mask=mask, use_cache=False).logits
            found = tower(input_ids=ids, attention_mask=mask, use_cache=False).logits
    except Exception as error:
        if is_low_memory(error):
            raise
        raise ActExportError(
            f"the text tower of {name}, a {tower.family} model, doesn't run alone: {first_line(error)}"
        ) from error
    found = found.to(expected.device)
    finite = expected[expected.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    difference = float(torch.where(found == expected, 0, found - expected).abs().max()) / max(largest, 1e-30)
    if not difference <= _TOLERANCE[tower.dtype]:
        raise ActExportError(
            f"the text tower of {name}, a {tower.family} model, computes other logits than the whole model does, by "
            f"{difference:.1e} of the largest; such models can't be exported yet"
        )
    return tower


def check_takes_embeddings(model: PreTrainedModel) -> None:
    """Refuses a vision-language model whose images need more than embeddings and positions.

    Raises:
        ActExportError: With the reason.
    """
    if not isinstance(model, TextTower) or model.family in IMAGES_AS_EMBEDDINGS:
        return
    reason = _OTHERWISE.get(model.family, "it isn't known that images reach it as embeddings alone")
    raise ActExportError(
        f"--inputs-embeds isn't for {model.family} models: {reason}. Leave it out to export the model for text; "
        f"images go into {', '.join(IMAGES_AS_EMBEDDINGS)}"
    )


def config_of(model: PreTrainedModel, *, with_vision: bool) -> PreTrainedConfig:
    """A model's configuration; of a text tower with `with_vision` that of the vision-language model."""
    return model.whole_config if with_vision and isinstance(model, TextTower) else model.config


def family_of(model: PreTrainedModel) -> str:
    """Model type of the vision-language model that a text tower is of; "" for other models."""
    return model.family if isinstance(model, TextTower) else ""


def placeholders_of(model: PreTrainedModel) -> tuple[int, ...]:
    """Token ids that stand for images, videos or sound; none for other models."""
    return model.placeholders if isinstance(model, TextTower) else ()


def _placeholders(config: PreTrainedConfig) -> tuple[int, ...]:
    found = {getattr(config, name, None) for name in _PLACEHOLDERS}
    return tuple(sorted(token for token in found if isinstance(token, int)))


def position_axes(model: PreTrainedModel) -> int:
    """How many positions a token has: 3 with M-RoPE (time, height, width), else 1."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    return 3 if "mrope_section" in rope else 1


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the embeddings that the decoder takes."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)  # an embedding's
    return int(table.shape[1])


@contextmanager
def one_rotation(model: PreTrainedModel) -> Iterator[None]:
    """Has M-RoPE look up which of the three positions turns each frequency, for the duration of the block.

    transformers computes all three rotations and puts together pieces of them. The results are the same, the graph is
    shorter: the angles are made once for all layers, as those of any other rotary embedding.
    """
    replaced = [module for module in model.modules() if _is_m_rope(module)]
    for module in replaced:
        module.forward = _Rotation(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


class _Rotation:
    """Stands in for the forward pass of a rotary embedding with sections."""

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary
        sections: Sequence[int] = rotary.mrope_section  # type: ignore[assignment]
        self.axes = torch.tensor([axis % 3 for axis, size in enumerate(sections) for _ in range(size)])

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (batch, sequence, head size) for activations `x`.

        Args:
            x: For its type.
            position_ids: (3, batch, sequence), or (1, batch, sequence) where the three are the same.
        """
        rotary: Any = self.rotary
        if position_ids.shape[0] > 1:
            position_ids = position_ids.index_select(0, self.axes.to(position_ids.device))
        positions = position_ids.permute(1, 2, 0)
        angles = positions.float() * rotary.inv_freq.float()
        angles = torch.cat([angles, angles], -1)
        scale = rotary.attention_scaling
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


def _is_m_rope(module: nn.Module) -> bool:
    """The kind that Qwen2-VL has: pieces of frequencies in turn, of time, height and width."""
    return hasattr(module, "mrope_section") and hasattr(module, "recomposition_frequencies")


def _decoder(whole: PreTrainedModel) -> PreTrainedModel:
    holders = [module for module in (getattr(whole, "model", None), whole) if module is not None]
    found = (getattr(holder, name, None) for holder in holders for name in _TOWERS)
    decoder = next((module for module in found if isinstance(module, PreTrainedModel)), None)
    if decoder is None or _head(whole) is None:
        what = "no language_model or text_model" if decoder is None else "no output matrix"
        raise ActExportError(f"{type(whole).__name__} has {what} that could be exported as a causal language model")
    return decoder


def _head(whole: Any) -> nn.Module | None:
    found: nn.Module | None = whole.get_output_embeddings()
    return found


def _text_tokens(tower: TextTower) -> list[int]:
    """A few tokens from all over the vocabulary that stand for text."""
    size = int(tower.config.vocab_size)
    picks = [size * part // 9 for part in range(1, 9)]
    return [token for token in picks if token not in tower.placeholders]
