"""The step of tools/check_gpu that measures a whole model: random weights, calibrated and plain export, PyTorch."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from gpu_programs import FAILED, PASSED, RECIPE, RECIPE_LAYERS, ROOT, SKIPPED, Check, python, run

STEP = "model"
NEEDED = ("transformers", "safetensors", "accelerate", "onnxscript", "onnx_ir", "typer", "rich")
LAYER_BYTES, OTHER_BYTES = 405e6, 525e6  # of bfloat16 weights of a layer, and of embeddings and output
# In the weights' size: the export holds them in float32 and more; a GPU holds three models at a time and their caches.
HOST_TIMES, GPU_TIMES, DISK_TIMES = 4.0, 4.0, 3.5
PROMPT_TOKENS, NEW_TOKENS = 2048, 128


def bench_model(check: Check) -> None:
    """Exports a Llama-2-7B of random weights with a published recipe, and plain, and compares them with PyTorch."""
    reason = why_not(check)
    if reason:
        check.add(STEP, SKIPPED, reason)
        return
    package = package_folder(check)
    path = run("model.library", [sys.executable, "-c", SAY_LIBRARY], check, 120, package)
    if path.code != 0 or check.library is None or Path(path.output.strip()) != check.library.resolve():
        found = path.output.strip() or path.last_words
        check.add(STEP, FAILED, f"this Python's act-export takes another library, {found}: install that of the check")
        return
    checkpoint, calibrated, plain = (check.out / name for name in ("checkpoint", "calibrated.onnx", "plain.onnx"))
    shutil.rmtree(checkpoint, ignore_errors=True)
    act_export = [sys.executable, "-m", "act_export"]
    export = [*act_export, checkpoint, "--dtype", "bfloat16", "--no-verify"]
    bench = [*act_export, "bench", calibrated, "--against", plain, "--device", check.device]
    bench += ["--prompt-tokens", PROMPT_TOKENS, "--new-tokens", NEW_TOKENS]
    with_pytorch = bool(check.environment.get("torch_cuda"))
    bench += ["--pytorch", checkpoint, "--pytorch-rounds", 2] if with_pytorch else []
    bench += ["--rounds", 3 if check.quick else 5]
    measured = check.out / "model.json"
    for name, command in (
        ("model.weights", python("random_llama.py", "--out", checkpoint, "--layers", check.layers)),
        ("model.calibrated", [*export, "--calibration", recipe(check), "--out", calibrated]),
        ("model.plain", [*export, "--plain", "--out", plain]),
        ("model.bench", [*bench, "--json", measured]),
    ):
        outcome = run(name, command, check, path=package)
        if outcome.code != 0:
            check.add(STEP, FAILED, f"{name}: {outcome.failure}")
            return
    report = json.loads(measured.read_text(encoding="utf-8"))
    check.measurements[STEP] = report
    check.markdown.append(f"```\n{outcome.output.strip()}\n```")
    left_out = "" if with_pytorch else "; without PyTorch, which has no CUDA here"
    check.add(STEP, PASSED, f"{check.layers} layers, bfloat16, {PROMPT_TOKENS} tokens; {describe(report)}{left_out}")


SAY_LIBRARY = "from act_export.ops.library import library_path; print(library_path())"


def why_not(check: Check) -> str:
    """Why there is no such measurement; empty where there is."""
    if check.model == "no":
        return "left out"
    if not check.on_gpu:
        return "needs a GPU"
    missing = [name for name in NEEDED if name not in check.environment.get("model_packages", {})]
    if missing:
        return f"this Python lacks {', '.join(missing)}"
    if check.model == "yes":
        return ""
    size = check.layers * LAYER_BYTES + OTHER_BYTES
    gpu = (check.environment.get("gpu") or {}).get("memory_bytes", 0)
    rooms = (
        ("the GPU", gpu, GPU_TIMES * size),
        ("the host's memory", available_bytes(), HOST_TIMES * size),
        (f"the disk of {check.out}", shutil.disk_usage(check.out).free, DISK_TIMES * size),
    )
    for name, free, needed in rooms:
        if free < needed:
            return (
                f"{name} has {free / 1e9:.0f} GB free, and {check.layers} layers take {needed / 1e9:.0f}: "
                "lower --layers, or --model yes to try"
            )
    return ""


def available_bytes() -> int:
    """Memory of the host that programs can still have."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def package_folder(check: Check) -> str:
    """A folder to import act_export from: this checkout's, with the library that is checked."""
    folder = check.out / "package"
    shutil.rmtree(folder, ignore_errors=True)
    operators = folder / "act_export" / "ops"
    operators.mkdir(parents=True)
    (folder / "models").symlink_to(ROOT / "models")
    for entry in (ROOT / "act_export").iterdir():
        if entry.name != "ops":
            (folder / "act_export" / entry.name).symlink_to(entry)
    for entry in (ROOT / "act_export" / "ops").iterdir():
        (operators / entry.name).symlink_to(entry)
    library = operators / "libact_ops.so"
    library.unlink(missing_ok=True)
    if check.library is not None:
        library.symlink_to(check.library.resolve())
    return str(folder)


def recipe(check: Check) -> str:
    """Name of the published recipe, or for fewer layers a file with its heads in those."""
    if check.layers == RECIPE_LAYERS:
        return RECIPE
    shipped = json.loads((ROOT / "models" / f"{RECIPE}.json").read_text(encoding="utf-8"))
    kept = {key: shipped[key] for key in ("format", "version", "beta", "threshold", "threshold_mode")}
    kept["heads"] = {layer: heads for layer, heads in shipped["heads"].items() if int(layer) < check.layers}
    path = check.out / "calibration.json"
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return str(path)


def describe(report: dict[str, Any]) -> str:
    """Ratios of times, in words."""
    parts = [
        f"calibrated / {found['against']}: prompt {found['prompt']['of_medians']:.2f}, "
        f"decode {found['decode']['of_medians']:.2f}"
        for found in report["ratios"]
    ]
    return "; ".join(parts)
