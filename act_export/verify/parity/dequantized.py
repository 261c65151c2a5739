"""A torch model with the weights of a quantized ONNX file: what such a file is held against."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from act_export.checkpoint.load import Checkpoint
from act_export.errors import ActExportError
from act_export.verify.parity.int8_activations import int8_activations_model
from act_export.verify.parity.quantized_file import LOOKUP, QuantizedWeight, quantized_weights
from act_export.verify.parity.stacked_experts import ExpertWeight, expert_weights, is_experts, replace_expert_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LARGEST_DISTANCE = 0.35  # relative; rounding to 4 bits gives about 0.1, another weight about 1.4
_SAMPLED_ROWS = 16
_PROJECTED = 64  # numbers that stand for a row where rows are searched: their distances are near those of the rows
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Dequantized:
    """A checkpoint with a file's weights.

    Attributes:
        checkpoint: As before but for the weights: the model is a copy that shares what the file doesn't quantize.
        bits: The fewest that a weight of the file is stored in.
        int8_inputs: Layers, and projections of experts, whose inputs the file may round to int8, by name, and in blocks
            of how many.
    """

    checkpoint: Checkpoint
    bits: int
    int8_inputs: Mapping[str, int]

    @property
    def precision(self) -> str:
        """The row of `act_export.verify.parity.metrics.GATES`."""
        return f"int{self.bits} with int8 activations" if self.int8_inputs else f"int{self.bits}"

    def rounding(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of the model that rounds activations where the file does."""
        return int8_activations_model(model, self.int8_inputs)


def check_quantized(path: Path) -> None:
    """Refuses a file without quantized weights before a model is loaded.

    Raises:
        ActExportError: If it can't be read, or has none.
    """
    _weights_of(path)


def _weights_of(path: str | os.PathLike[str]) -> list[QuantizedWeight]:
    weights = quantized_weights(path)
    if not weights:
        raise ActExportError(f"{path} has no quantized weights (MatMulNBits); pass a file of --dtype int4 or int8")
    return weights


def dequantized(path: str | os.PathLike[str], checkpoint: Checkpoint) -> Dequantized:
    """The model with the weights that a file has.

    Weights are told by their values, not by names: the layer whose weight has the same number of inputs and lies
    closest. A file may pack the outputs of several layers into one weight, split those of one, or put them in another
    order, as it is done for query, key and value that a checkpoint stores head by head. Experts, which are
    many and may be alike, are told by their names in files of act-export, and must be close all the same. Biases, norms
    and what the file doesn't quantize stay the checkpoint's.

    Args:
        path: An ONNX file with MatMulNBits, and perhaps GatherBlockQuantized: of act-export, or of others.
        checkpoint: The model that the file was made from.

    Raises:
        ActExportError: If the file's weights can't be read; if it has none, or one of them is none of the model's,
            naming it.
    """
    weights = _weights_of(path)
    model = _copy(checkpoint.model)
    layers = list(_layers(model))
    experts = {layer.name: layer for layer in layers if layer.of_expert is not None}
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    int8_inputs: dict[str, int] = {}
    for weight in weights:
        values = torch.from_numpy(weight.dequantize())
        named = experts.get(str(weight.packed.name).rpartition(".weight")[0])
        fitting = [layer for layer in ([named] if named is not None else layers) if layer.fits(weight)]
        for part in _match(weight, values, fitting, checkpoint.name):
            rows.setdefault(part.layer.name, []).append((part.indices, values[part.rows]))
            if weight.rounds_inputs:
                int8_inputs[part.layer.rounded] = weight.block_size
    _replace_weights(layers, rows)
    bits = min(weight.bits for weight in weights)
    of_file = replace(checkpoint, model=model, weights=f"int{bits} of {Path(path).name}")
    return Dequantized(of_file, bits, int8_inputs)


@dataclass(frozen=True)
class _Layer:
    """A layer with a weight.

    Attributes:
        name: Its path in the model.
        module: Linear, Conv1D, Embedding, or the experts that it is one of.
        weight: (outputs, inputs), or (tokens, width).
        of_expert: Which of the experts' weights it is.
    """

    name: str
    module: torch.nn.Module
    weight: Tensor
    of_expert: ExpertWeight | None = None

    @property
    def rounded(self) -> str:
        """Whose inputs are rounded with this layer's: the layer's own, or those of a projection of all experts."""
        if self.of_expert is None:
            return self.name
        return f"{self.name.rsplit('.', 2)[0]}.{self.of_expert.projection}"

    def fits(self, weight: QuantizedWeight) -> bool:
        looks_up = isinstance(self.module, torch.nn.Embedding)
        return looks_up == (weight.operator == LOOKUP) and self.weight.shape[1] == weight.inputs


@dataclass(frozen=True)
class _Part:
    """Rows of a file's weight that are rows of a layer's: which of them, in the file's order."""

    layer: _Layer
    indices: Tensor
    rows: slice

    @property
    def of_layer(self) -> Tensor:
        return self.layer.weight[self.indices]

    def distance(self, values: Tensor, step: int = 1) -> float:
        """Relative to the layer's weight, in the Frobenius norm; of every `step`-th row."""
        own = self.layer.weight[self.indices[::step]].detach().to("cpu", torch.float32)
        norm = float(own.norm())
        return float((values[self.rows][::step] - own).norm()) / max(norm, torch.finfo(torch.float32).tiny)


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters are the model's own, to be replaced one by one."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _layers(model: torch.nn.Module) -> Iterator[_Layer]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            yield _Layer(name, module, module.weight)
        elif isinstance(module, Conv1D):
            yield _Layer(name, module, module.weight.T)
        elif is_experts(module):
            for each in expert_weights(module):
                yield _Layer(f"{name}.{each.expert}.{each.projection}", module, each.weight, each)


def _match(weight: QuantizedWeight, values: Tensor, layers: Sequence[_Layer], name: str) -> list[_Part]:
    """The rows of which layers a weight is made of, in order."""
    parts: list[_Part] = []
    start = 0
    while start < weight.outputs:
        left = range(start, weight.outputs)
        near = _near(values, (part for layer in layers for part in _whole(layer, left)))
        near = near or _near(values, (part for layer in layers for part in _shares(layer, left)))
        near = near or _near(values, (part for layer in layers for part in _reordered(layer, left, values)))
        if not near or near[0].distance(values) >= _LARGEST_DISTANCE:
            raise ActExportError(
                f"{weight.name}, {weight.outputs} x {weight.inputs}, is no weight of {name} from row {start} on, not "
                f"even nearly; pass the checkpoint that the file was made from"
            )
        if len(near) > 1 and not torch.equal(near[0].of_layer, near[1].of_layer):  # equal ones: no matter which
            raise ActExportError(
                f"{weight.name} may be the weight of {near[0].layer.name} or of {near[1].layer.name}: they are "
                f"too much alike to be told apart"
            )
        parts.append(near[0])
        start = near[0].rows.stop
    return parts


def _near(values: Tensor, candidates: Iterable[_Part]) -> list[_Part]:
    """Those that a sample of rows is close to, the nearest first."""
    distances = [(part.distance(values, _step(part)), part) for part in candidates]
    close = [(distance, part) for distance, part in distances if distance < _LARGEST_DISTANCE]
    return [part for _, part in sorted(close, key=lambda found: found[0])]


def _whole(layer: _Layer, left: range) -> Iterator[_Part]:
    """A layer's whole weight, if it has no more rows than are left."""
    if len(layer.weight) <= len(left):
        yield _Part(layer, torch.arange(len(layer.weight)), slice(left.start, left.start + len(layer.weight)))


def _shares(layer: _Layer, left: range) -> Iterator[_Part]:
    """The equal shares of a layer's larger weight that the rows left may be."""
    if len(layer.weight) > len(left) and len(layer.weight) % len(left) == 0:
        for first in range(0, len(layer.weight), len(left)):
            yield _Part(layer, torch.arange(first, first + len(left)), slice(left.start, left.stop))


def _reordered(layer: _Layer, left: range, values: Tensor) -> Iterator[_Part]:
    """A layer's whole weight in another order of its rows, if some rows are close to some of its."""
    for whole in _whole(layer, left):
        own = layer.weight.detach().to("cpu", torch.float32)
        step = _step(whole)
        sample = values[whole.rows][::step]
        if float((sample - own[_nearest_rows(sample, own)]).norm() / sample.norm()) >= _LARGEST_DISTANCE:
            continue
        order = _nearest_rows(values[whole.rows], own)
        if bool((torch.bincount(order, minlength=len(own)) == 1).all()):
            yield replace(whole, indices=order)


def _nearest_rows(rows: Tensor, of: Tensor) -> Tensor:
    """For each row, which row of another matrix is nearest."""
    projection = torch.randn(of.shape[1], _PROJECTED, generator=torch.Generator().manual_seed(0))
    projected = of @ projection
    parts = [rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE)]
    return torch.cat([torch.cdist(part @ projection, projected).argmin(1) for part in parts])


def _step(part: _Part) -> int:
    return max(len(part.of_layer) // _SAMPLED_ROWS, 1)


def _replace_weights(layers: Sequence[_Layer], rows: Mapping[str, Sequence[tuple[Tensor, Tensor]]]) -> None:
    """Gives layers the rows found for them; weights that were tied and still agree stay so."""
    replaced: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
    of_experts: dict[torch.nn.Module, list[ExpertWeight]] = {}
    for layer in layers:
        if layer.name not in rows:
            continue
        weight = layer.weight.detach().clone()
        for indices, values in rows[layer.name]:
            weight[indices.to(weight.device)] = values.to(weight.device, weight.dtype)
        if layer.of_expert is not None:
            of_experts.setdefault(layer.module, []).append(replace(layer.of_expert, weight=weight))
            continue
        if isinstance(layer.module, Conv1D):
            weight = weight.T.contiguous()
        before = layer.module.weight
        assert isinstance(before, torch.nn.Parameter)
        tied = [new for old, new in replaced if old is before and torch.equal(new, weight)]
        layer.module.weight = tied[0] if tied else torch.nn.Parameter(weight, requires_grad=False)
        replaced.append((before, layer.module.weight))
    for module, weights in of_experts.items():
        replace_expert_weights(module, weights)
