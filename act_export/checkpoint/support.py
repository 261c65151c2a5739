"""Which models can't be calibrated, and why, by their configuration and modules alone: before any weight is read.

What isn't known here is tried: the hook refuses a model whose attention it can't replace, and an export is compared
with the model's own attention before it is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_ATTENTION_LAYERS = {"attention", "full_attention", "sliding_attention"}
_RECURRENT = "which keep a state instead of keys and have no attention map"
_OTHER_LAYERS = {
    "chunked_attention": "whose tokens see their own chunk alone",
    "conv": "which have no attention map",
    "hybrid": "which keep a state beside keys",
    "hybrid_sliding": "which keep a state beside keys",
    "linear_attention": _RECURRENT,
    "mamba": _RECURRENT,
    "recurrent": _RECURRENT,
    "indexed_attention": "whose tokens choose the keys that they see",
}
_CROSS_ATTENTION = {"encoder_attn", "cross_attn", "crossattention"}


def why_unsupported(config: PreTrainedConfig) -> str | None:
    """Why a model with this configuration can't be calibrated, in a sentence; None where it's worth a try."""
    name = config.model_type
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        return f"{name} is an encoder-decoder model; only decoder-only models can be calibrated"
    # Encoders that can also be built as decoders have both settings.
    if getattr(text, "is_decoder", True) is False and hasattr(text, "add_cross_attention"):
        return (
            f"{name} is an encoder, whose tokens see those after them too; it can be calibrated only where its "
            f"config.json says is_decoder: true"
        )
    if getattr(text, "is_causal", True) is False:
        return f"{name} isn't causal: its tokens see those after them too (is_causal is false in its config.json)"
    if _gives(text, "add_cross_attention") or _gives(text, "cross_attention_layers"):
        return f"{name} attends to the output of another model; only attention of tokens to tokens can be calibrated"
    if _gives(text, "kv_lora_rank"):
        return (
            f"{name} uses multi-head latent attention, whose cache holds compressed keys and values (kv_lora_rank in "
            f"its config.json); only attention that caches keys and values can be calibrated"
        )
    if (reason := _why_of_layers(text, name)) is not None:
        return reason
    if _is_recurrent(config):
        return f"{name} has recurrent layers, {_RECURRENT}; only attention can be calibrated"
    return None


def why_unsupported_model(model: PreTrainedModel) -> str | None:
    """As `why_unsupported`, of a model that is built; its modules are looked at too."""
    reason = why_unsupported(model.config)
    if reason is None and any(name.rpartition(".")[2] in _CROSS_ATTENTION for name, _ in model.named_modules()):
        return (
            f"{model.config.model_type} has layers that attend to the output of an encoder; only attention of tokens "
            f"to tokens can be calibrated"
        )
    return reason


def _why_of_layers(config: PreTrainedConfig, name: str) -> str | None:
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    others = sorted(set(kinds) - _ATTENTION_LAYERS)
    if not others:
        return None
    described = [f"{kind}, {_OTHER_LAYERS[kind]}" if kind in _OTHER_LAYERS else kind for kind in others]
    return (
        f"{name} has layers of type {'; of type '.join(described)}; only full and sliding-window attention can be "
        f"calibrated"
    )


def _is_recurrent(config: PreTrainedConfig) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return bool(getattr(architecture, "_is_stateful", False))


def _gives(config: PreTrainedConfig, setting: str) -> bool:
    """Whether a configuration has a setting that isn't zero, false or empty."""
    try:
        return bool(getattr(config, setting, None))
    except RuntimeError:  # it has one for each layer
        return True
