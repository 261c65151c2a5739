"""Tiny random vision-language models, prompts with images for them, and their towers against the whole.

An image is of random pixels; its way is the real one: the model's own vision encoder in PyTorch, then the exported
tower in ONNX Runtime, against the whole model in PyTorch with its text tower under the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tiny_models import COMMON
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from act_export.attention.call import AttentionHook, LayerState, SinkCache, activated
from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.file import Calibration
from act_export.checkpoint.identity import identify
from act_export.checkpoint.load import Checkpoint
from act_export.checkpoint.text_tower import text_tower
from act_export.runtime import Session
from act_export.runtime.image_positions import image_positions

IMAGE_TOKEN = 250
MERGE = 2
_TEXT = {name: value for name, value in COMMON.items() if name != "head_dim"}
_M_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_ENCODER = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "initializer_range": 0.4,
}
_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 251,
    "vision_start_token_id": 252,
    "vision_end_token_id": 253,
}
CONFIGURATIONS = {
    "qwen2_vl": {
        "text_config": {**_TEXT, **_M_ROPE},
        "vision_config": {**_ENCODER, "embed_dim": 16, "hidden_size": 32},
        **_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, **_M_ROPE},
        "vision_config": {
            **_ENCODER,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        **_TOKENS,
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_CLIP, "model_type": "clip_vision_model"},
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -1,
    },
    "gemma3": {
        "text_config": {**_TEXT, "head_dim": 8, "sliding_window": 7},
        "vision_config": {**_CLIP, "model_type": "siglip_vision_model"},
        "image_token_index": IMAGE_TOKEN,
        "mm_tokens_per_image": 4,
    },
    "idefics3": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_CLIP},
        "image_token_id": IMAGE_TOKEN,
        "scale_factor": 2,
    },
}


def tiny_whole(family: str = "qwen2_vl", seed: int = 0) -> PreTrainedModel:
    """A random vision-language model, in evaluation mode."""
    config = AutoConfig.for_model(family, **CONFIGURATIONS[family])
    torch.manual_seed(seed)
    return AutoModelForImageTextToText.from_config(config).eval().requires_grad_(False)


def tower_checkpoint(whole: PreTrainedModel) -> Checkpoint:
    """Its text tower as a loaded checkpoint, which shares its modules."""
    tower = text_tower(whole, "tiny")
    return Checkpoint("tiny", tower, None, identify(tower))


@dataclass(frozen=True)
class ImagePrompts:
    """Prompts with images, shorter ones padded on the left.

    Attributes:
        input_ids: (batch, sequence), with an image token for each embedding of an image.
        attention_mask: (batch, sequence).
        images: What the model's vision encoder takes.
        grids: Of each image, of models with M-RoPE: 1, rows and columns of patches.
    """

    input_ids: Tensor
    attention_mask: Tensor
    images: dict[str, Tensor]
    grids: Tensor | None = None


def image_prompts(family: str, seed: int = 0) -> ImagePrompts:
    """Two prompts of different lengths with an image each."""
    random = torch.Generator().manual_seed(seed)
    words = ((7, 5), (3, 11))  # before and after
    if family == "llava":
        pixels = torch.randn(2, 3, 16, 16, generator=random)
        ids, mask = _left_pad([_prompt([IMAGE_TOKEN] * 16, each, random) for each in ((7, 5), (2, 4))])
        return ImagePrompts(ids, mask, {"pixel_values": pixels})
    grids = torch.tensor([[1, 6, 4], [1, 4, 10]])
    sizes = [int(grid.prod()) // MERGE**2 for grid in grids]
    rows = [_prompt([252, *[IMAGE_TOKEN] * size, 253], each, random) for size, each in zip(sizes, words, strict=True)]
    ids, mask = _left_pad(rows)
    patches = torch.randn(int(grids.prod(1).sum()), 3 * 2 * 4 * 4, generator=random)
    return ImagePrompts(ids, mask, {"pixel_values": patches, "image_grid_thw": grids}, grids)


def _prompt(image: list[int], words: tuple[int, int], random: torch.Generator) -> list[int]:
    before, after = (torch.randint(3, 240, (count,), generator=random).tolist() for count in words)
    return [*before, *image, *after]


def _left_pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[5] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@dataclass(frozen=True)
class Compared:
    """Largest differences of a logit.

    Attributes:
        prompt: Of all positions of the prompts, from the whole model.
        decode: Of the steps after it, from the whole model.
        by_calibration: Of all positions of the prompts, between the whole model with and without calibration.
    """

    prompt: float
    decode: float
    by_calibration: float


def compare_with_whole(
    whole: PreTrainedModel, tower: PreTrainedModel, session: Session, calibration: Calibration, steps: int = 6
) -> Compared:
    """Prompts with images and decode steps, in the exported tower and in the whole model.

    Args:
        whole: The vision-language model.
        tower: Its text tower, which shares its modules.
        session: Over the exported tower, which takes embeddings.
        calibration: That is in the file.
        steps: Tokens after the prompts.
    """
    given = image_prompts(str(whole.config.model_type))
    ids, mask = given.input_ids, given.attention_mask
    inputs: dict[str, Any] = {"input_ids": ids, **given.images}
    positions = None
    if given.grids is None:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    else:
        inputs["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
        positions = image_positions(
            ids.numpy(), mask.numpy(), given.grids.numpy(), image_token=IMAGE_TOKEN, merge=MERGE
        )
    with torch.no_grad():
        plain = whole(attention_mask=mask, **inputs).logits
        features = whole.get_image_features(**given.images).pooler_output
    embeddings = session.embed(ids.numpy())
    embeddings[ids.numpy() == IMAGE_TOKEN] = torch.cat(tuple(features)).numpy()
    hook = ReferenceAttention(calibration)
    cache = session.allocate(len(ids), capacity=8)
    real = mask.bool()
    decode = []
    with attention_hook(tower, hook):
        expected, state = _run_whole(whole, hook, mask, [None, None], inputs)
        by_calibration = float((plain - expected).abs()[real].max())
        deltas = whole.model.rope_deltas[None] if given.grids is not None else 0
        ours = cache.step(embeddings, mask.numpy(), position_ids=positions, logits_to_keep=0)
        prompt = np.abs(ours - expected.numpy())[real.numpy()].max()
        for _ in range(steps):
            tokens = expected[:, -1].argmax(-1)[:, None]
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
            places = (mask.cumsum(-1) - 1)[:, -1:] + deltas
            expected, state = _run_whole(whole, hook, mask, state, {"input_ids": tokens, "position_ids": places})
            decode.append(np.abs(cache.step(tokens.numpy()) - expected.numpy()[:, -1:]).max())
    return Compared(float(prompt), float(max(decode)), by_calibration)


def _run_whole(
    whole: PreTrainedModel,
    hook: AttentionHook,
    attention_mask: Tensor,
    state: list[LayerState | None],
    inputs: dict[str, Any],
) -> tuple[Tensor, list[LayerState | None]]:
    """The whole model, whose text tower is under a hook: logits and state."""
    cache = SinkCache(state, attention_mask)
    with torch.no_grad(), activated(hook, cache):
        logits = whole(attention_mask=attention_mask, cache=cache, use_cache=True, **inputs).logits
    return logits, cache.states
