"""What a case of gpu_cases.py should give: the reference in float64, and PyTorch's error in the case's type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gpu_cases import Case, Tokens
from on_device import Array

from act_export.calibration.reference import (
    attention_probabilities,
    calibrate_with_state,
    calibrated_attention,
    sink_margins,
)


@dataclass(frozen=True)
class Truth:
    """What one call should give.

    Attributes:
        output: (batch, sequence, heads * head_size), float64.
        column_sums: (batch, calibrated heads, total), float64.
        pytorch_error: Largest, of a real row of PyTorch's output in the case's type; 0 in float32.
        margin: The least distance of a sink score from the threshold: rounding decides where it is tiny.
        real_rows: Boolean (batch, sequence).
    """

    output: Array
    column_sums: Array
    pytorch_error: float
    margin: float
    real_rows: Array


def true_calls(case: Case, tokens: Tokens) -> list[Truth]:
    """What each call should give, from the same stored numbers."""
    sums = torch.from_numpy(tokens.past_sums).double()
    truths = []
    past = case.past
    for sequence in case.calls:
        truth = true_call(case, tokens, past, sequence, sums)
        sums = torch.from_numpy(truth.column_sums).unsqueeze(-1)
        truths.append(truth)
        past += sequence
    return truths


def true_call(case: Case, tokens: Tokens, past: int, sequence: int, past_sums: torch.Tensor) -> Truth:
    total = past + sequence
    first = past - case.past
    query = torch.from_numpy(tokens.query[:, first : first + sequence].astype(np.float64))
    key, value = (torch.from_numpy(array[:, :total].astype(np.float64)) for array in (tokens.key, tokens.value))
    mask = torch.from_numpy(tokens.mask[:, :total])
    options = calibration_of(case)
    outputs = calibrated_attention(
        query.flatten(2),
        key[:, past:].flatten(2),
        value[:, past:].flatten(2),
        key[:, :past].transpose(1, 2),
        value[:, :past].transpose(1, 2),
        past_sums,
        mask,
        num_heads=case.heads,
        kv_num_heads=case.kv_heads,
        scale=single(case.head_size**-0.5),
        softcap=single(case.softcap),
        sliding_window=case.sliding_window,
        calibrated_heads=case.calibrated_heads,
        beta=[single(beta) for beta in case.beta],
        **options,
    )
    column_sums = outputs.present_sink_scores.squeeze(-1)
    real = mask != 0
    margins = sink_margins(column_sums, real[:, None], sliding_window=case.sliding_window, **options)
    margins = margins.masked_fill(~real[:, None], np.inf).abs()
    real_rows = real[:, past:].numpy()
    output = outputs.output.numpy()
    pytorch_error = 0.0
    if case.dtype != "float32":
        stored = eager_output(case, query, key, value, past_sums, mask)
        pytorch_error = float(np.abs(stored.double().numpy() - output)[real_rows].max(initial=0.0))
    margin = float(margins.min()) if case.calibrated_heads else np.inf
    return Truth(output, column_sums.double().numpy(), pytorch_error, margin, real_rows)


def eager_output(
    case: Case,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_sums: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """PyTorch in the case's type, as transformers' eager attention: a map in float32, rounded, times the values."""
    dtype = getattr(torch, case.dtype)
    group = case.heads // case.kv_heads
    real = mask != 0
    probabilities = attention_probabilities(
        query.float().transpose(1, 2),
        key.float().transpose(1, 2).repeat_interleave(group, 1),
        real,
        scale=case.head_size**-0.5,
        softcap=case.softcap,
        sliding_window=case.sliding_window,
    )
    heads = list(case.calibrated_heads)
    if heads:
        calibrated = calibrate_with_state(
            probabilities[:, heads],
            beta=torch.tensor(case.beta).view(-1, 1, 1),
            real=real[:, None],
            past_column_sums=past_sums.squeeze(-1).float(),
            sliding_window=case.sliding_window,
            **calibration_of(case),
        )
        probabilities = probabilities.index_copy(1, torch.tensor(heads), calibrated.probabilities)
    values = value.to(dtype).transpose(1, 2).repeat_interleave(group, 1)
    return (probabilities.to(dtype) @ values).transpose(1, 2).flatten(2)


def calibration_of(case: Case) -> dict[str, Any]:
    return {"threshold": single(case.threshold), "threshold_mode": case.threshold_mode}


def single(number: float) -> float:
    """A number as the node's attribute holds it."""
    return float(np.float32(number))
