"""Traces that tests share: within a run, torch's exporter records each tiny model once, whichever process comes first.

What it gives depends on the configuration, the buffers and the heads that can be calibrated, not on the values of
parameters: the large ones are away while it works, and a model's own small ones are put into its copy of the trace. All
that act-export does with it is done each time. Where a test has patched what takes part, and of models whose code isn't
transformers' own, the trace is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

from act_export.export.operator import OperatorAttention

_LARGEST = 4 << 20  # numbers of a model
_TAKES_PART = (
    *("torch", "transformers", "onnxscript", "onnx_ir", "act_export.attention", "act_export.calibration"),
    *("act_export.checkpoint", "act_export.export", "act_export.ops"),
)
_TAKES_NO_PART = ("act_export.calibration.recipes", "act_export.checkpoint.hub", "act_export.checkpoint.gguf")
_OBJECTS = ("kwargs", "custom_translation_table")  # of the options: tensors and functions
_ORIGIN = ("_name_or_path", "architectures", "dtype", "transformers_version")  # of a configuration


class SharedTraces:
    """Stands in for `torch.onnx.export`.

    Attributes:
        folder: Where traces are kept, for all processes of the run.
        used: Whether they may be used, or all is traced anew.
        patches: Of the test that is running.
    """

    def __init__(self, folder: Path, export: Callable[..., Any]) -> None:
        self.folder = folder
        self.used = False
        self.patches: pytest.MonkeyPatch | None = None
        self._export = export

    def __call__(self, module: Any, *arguments: Any, **options: Any) -> Any:
        shared = self.used and not arguments and not self._takes_part()
        key = self._key(module, options) if shared else None
        if key is None:
            return self._export(module, *arguments, **options)
        path = self.folder / key
        if not path.is_file():
            program = self._export(module, **options)
            made = path.with_suffix(f".{os.getpid()}")
            made.write_bytes(ir.to_proto(program.model).SerializeToString())
            made.rename(path)
            return program
        model = ir.from_proto(onnx.ModelProto.FromString(path.read_bytes()))
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if name in model.graph.initializers:
                own = ir.Tensor(parameter.detach().clone().numpy(), name=name)
                model.graph.initializers[name].const_value = own
        return torch.onnx.ONNXProgram(model, None)

    def _takes_part(self) -> bool:
        """Whether anything is patched that a trace depends on."""
        patches = self.patches
        if patches is not None and any(owner is not os.environ for owner, *_ in patches._setitem):
            return True
        targets = [target for target, *_ in patches._setattr] if patches is not None else []
        names = [str(getattr(target, "__module__", None) or getattr(target, "__name__", "")) for target in targets]
        return any(name.startswith(_TAKES_PART) and not name.startswith(_TAKES_NO_PART) for name in names)

    def _key(self, module: Any, options: dict[str, Any]) -> str | None:
        hooked = getattr(module, "_hooked", None)
        if hooked is None or not isinstance(hooked.hook, OperatorAttention):
            return None
        model, hook = hooked.model, hooked.hook
        parameters = [*model.named_parameters(remove_duplicate=False)]
        buffers = [*model.named_buffers(remove_duplicate=False)]
        ours = type(model).__module__.startswith(("transformers.models.", "act_export."))
        if not ours or sum(values.numel() for _, values in (*parameters, *buffers)) > _LARGEST:
            return None
        given = {name: str(option) for name, option in options.items() if name not in _OBJECTS}
        config = {name: value for name, value in model.config.to_dict().items() if name not in _ORIGIN}
        tensors = (*_tensors(options["kwargs"]), *parameters)
        shapes = [(name, str(tuple(part.shape)), str(part.dtype)) for name, part in tensors]
        text = [type(model).__qualname__, config, str(hook.heads), str(hook.sink_logits), given, shapes]
        digest = hashlib.sha256(json.dumps(text, default=str, sort_keys=True).encode())
        for name, values in buffers:
            digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
            digest.update(values.detach().float().numpy().tobytes())
        return digest.hexdigest()


def _tensors(example: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(name, part) for name, given in example.items() for part in (given if isinstance(given, list) else [given])]
