"""A model that is built without memory first: what its configuration asks for, against what the files hold."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

from act_export.checkpoint.configuration import rope_message, sizes_of
from act_export.checkpoint.loader_errors import quiet_transformers, readable_errors
from act_export.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from act_export.checkpoint.stored.safetensors_file import Stored

_ADVICE = "get the config.json that belongs to the weights"
_PARAMETERS_OF_A_TENSOR = 8  # that a stored tensor may be cut into, as the rows of joined projections are
_SPARE_PARAMETERS = 1_000
_LARGEST_TABLE_BYTES = 2 << 30  # of what isn't stored, such as masks and angles


def empty_model(
    config: PreTrainedConfig, loader: Any, tensors: Mapping[str, Stored], name: str, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A configuration's model, whose parameters and buffers have shapes and no values.

    Building it ends as soon as it has more or larger parameters than the stored tensors could fill, so that a count in
    a configuration takes neither time nor memory.

    Args:
        config: Stays as it is.
        loader: The class of transformers that builds it.
        tensors: What the checkpoint's files hold.
        name: What the user calls it.
        trust_remote_code: Whether code that comes with the checkpoint may run.

    Raises:
        CheckpointError: If the model is larger than the files, or can't be built.
    """
    from transformers import initialization

    with ExitStack() as stack:
        stack.enter_context(readable_errors(name))
        stack.enter_context(quiet_transformers())
        stack.enter_context(_bounded(config, tensors, name))
        stack.enter_context(torch.device("meta"))
        if hasattr(initialization, "meta_device_safe_creation_ops"):  # for code that looks at numbers while it builds
            stack.enter_context(initialization.meta_device_safe_creation_ops())
        try:
            built: PreTrainedModel = loader.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        except KeyError as error:
            message = rope_message(config, name, error.args[0] if error.args else None)
            raise (CheckpointError(message) if message else error) from error
        _check_run(built, tensors, name)
    return built


def _check_run(model: PreTrainedModel, tensors: Mapping[str, Stored], name: str) -> None:
    """Refuses a model that computes a huge table as it runs, such as biases for all positions that it may ever see.

    A model that can't be run without values runs as far as it goes.
    """
    model.train(False)
    ids = torch.zeros(1, 4, dtype=torch.long)
    try:
        with torch.no_grad(), _Sizes(model.config, _numbers(tensors), name):
            model(input_ids=ids, use_cache=False)
    except CheckpointError:
        raise
    except Exception:  # a value was asked for
        return


class _Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at the size of every result."""

    def __init__(self, config: PreTrainedConfig, numbers: int, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._config, self._numbers, self._name = config, numbers, name

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor) and each.numel() > self._numbers:  # else it may be a weight
                _check_table(each, f"by {function}", self._config, self._name)
        return made


def _check_table(value: Tensor, where: str, config: PreTrainedConfig, name: str) -> None:
    size = value.numel() * value.itemsize
    if size > _LARGEST_TABLE_BYTES:
        raise CheckpointError(
            f"by config.json of {name} the model computes a table of shape {list(value.shape)} {where}"
            f"{sizes_of(config, set(value.shape))}, of {size >> 30} GiB; {_ADVICE}"
        )


def _numbers(tensors: Mapping[str, Stored]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


@contextmanager
def _bounded(config: PreTrainedConfig, tensors: Mapping[str, Stored], name: str) -> Iterator[None]:
    """Ends the building of a model that the stored tensors can't fill."""
    most = _PARAMETERS_OF_A_TENSOR * len(tensors) + _SPARE_PARAMETERS
    numbers, count = _numbers(tensors), 0
    thread = threading.get_ident()  # the hooks are called for the models of every thread

    def parameter(owner: nn.Module, leaf: str, value: nn.Parameter | None) -> None:
        nonlocal count
        if value is None or threading.get_ident() != thread:
            return
        count += 1
        shape = tuple(value.shape)
        if math.prod(shape) > numbers:
            raise CheckpointError(
                f"by config.json of {name} a weight of {type(owner).__name__}, {leaf}, has shape {list(shape)}"
                f"{sizes_of(config, set(shape))}, but its files hold {numbers} numbers in all; {_ADVICE}"
            )
        if count > most:
            raise CheckpointError(
                f"by config.json of {name} the model has more than {most} weights{_counts(config, len(tensors))}, but "
                f"its files hold {len(tensors)} tensors; {_ADVICE}"
            )

    def table(owner: nn.Module, leaf: str, value: Tensor | None) -> None:
        if value is not None and threading.get_ident() == thread:
            _check_table(value, f"for {leaf} in {type(owner).__name__}", config, name)

    handles = [
        torch_module.register_module_parameter_registration_hook(parameter),
        torch_module.register_module_buffer_registration_hook(table),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _counts(config: PreTrainedConfig, tensors: int) -> str:
    """Settings that count more than there are tensors, such as layers, e.g. " (num_hidden_layers: 1000000)"."""
    words = ("layer", "expert", "block", "depth")
    large = {
        value
        for key, value in vars(config.get_text_config(decoder=True)).items()
        if isinstance(value, int) and value > tensors and any(word in key for word in words)
    }
    return sizes_of(config, large)
