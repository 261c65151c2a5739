"""The steps of tools/check_gpu: each runs programs of its own, so that a crash loses nothing else."""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from gpu_programs import FAILED, NOT_FOUND, PASSED, ROOT, SKIPPED, Check, Report, python, run

ERROR = 3  # gpu_parity.py's exit code after an error
MOST_RESTARTS = 8
FOUND_ERRORS = 99  # exit code that compute-sanitizer is told to give


def check_environment(check: Check) -> None:
    """GPU, driver, ONNX Runtime's package and the library."""
    outcome = run(
        "environment", python("gpu_environment.py", "--device", check.device, *check.library_options), check, 300
    )
    if outcome.code != 0:
        check.add("environment", FAILED, outcome.failure)
        return
    check.environment = json.loads(outcome.output.splitlines()[-1])
    found = check.environment
    problems = {name: text for name, text in found["problems"].items() if name != "library"}
    for name, text in problems.items():
        check.add(name, FAILED, text)
    gpu = found["gpu"]
    if gpu:
        size = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        check.add("GPU", PASSED, f"{gpu['name']}, compute capability {gpu['capability']}, {size}")
        check.add("driver", PASSED, f"{gpu['driver'] or 'unknown version'}, CUDA {gpu['cuda']}")
    provider = "CUDAExecutionProvider" if check.on_gpu else "CPUExecutionProvider"
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    cuda = f"CUDA {found['onnxruntime_cuda'] or 'none'}"
    available = provider in found["providers"]
    missing = "" if available else f"; no {provider}: install onnxruntime-gpu"
    check.add("packages", PASSED if available else FAILED, f"{versions}; ONNX Runtime with {cuda}{missing}")


def check_library(check: Check) -> None:
    """Finds the library with kernels for GPUs, and builds one if there is none."""
    installed = check.environment.get("library") or {}
    if check.library is None and installed and (installed["cuda"] or not check.on_gpu):
        check.library = Path(installed["path"])
    if check.library is None:
        check.library = build_library(check)
        if check.library is None:
            return
        outcome = run("library", python("gpu_environment.py", "--library", check.library), check, 300)
        installed = json.loads(outcome.output.splitlines()[-1])["library"] if outcome.code == 0 else {}
    kernels = ", ".join((installed or {}).get("cuda", ())) or "no kernels for GPUs"
    usable = bool((installed or {}).get("cuda")) or not check.on_gpu
    check.add("library", PASSED if usable else FAILED, f"{check.library}: {kernels}")


def build_library(check: Check) -> Path | None:
    """Builds the library with Triton; None where it can't be built."""
    folder = check.out / "library"
    cmake = ["cmake"] if shutil.which("cmake") else [sys.executable, "-m", "cmake"]
    settings = ["-DCMAKE_BUILD_TYPE=Release", "-DACT_CUDA=ON", f"-DACT_CUDA_PYTHON={sys.executable}"]
    settings += ["-G", "Ninja"] if shutil.which("ninja") and not shutil.which("make") else []
    for name, command in (
        ("configure", [*cmake, "-S", ROOT / "act_export" / "ops", "-B", folder, *settings]),
        ("build", [*cmake, "--build", folder, "--parallel", os.cpu_count() or 1]),
    ):
        outcome = run(name, command, check)
        if outcome.code != 0:
            needs = "it takes cmake, a C++17 compiler and Triton; or give a built one with --library"
            check.add("library", FAILED, f"{name}: {outcome.failure}; {needs}")
            return None
    return folder / "libact_ops.so"


def check_parity(check: Check) -> None:
    """Every case in every type; the run goes on after a case that ends it."""
    findings: list[Report] = []
    for dtype in check.dtypes:
        findings += parity_of(dtype, check)
    groups: dict[str, list[Report]] = {}
    for finding in findings:
        dtype = finding["case"].rpartition(", ")[2]
        kind = f"{'CUDA graph' if finding['case'].startswith('graph') else 'parity'}, {dtype}"
        groups.setdefault(kind, []).append(finding)
    check.measurements["parity"] = findings
    if not findings:
        check.add("parity", FAILED, "no case ran")
    for kind, group in groups.items():
        right = sum(finding["passed"] for finding in group)
        share = max((f["error"] / f["allowed"] for f in group if f["allowed"]), default=0.0)
        sums = max(f["sums_error"] for f in group)
        detail = f"{right} of {len(group)} cases right; largest error {share:.2f} of what is allowed"
        check.add(kind, PASSED if right == len(group) else FAILED, f"{detail}, of column sums {sums:.1e}")
    for finding in findings:
        if not finding["passed"]:
            check.add(f"case: {finding['case']}", FAILED, finding["message"])


def parity_of(dtype: str, check: Check) -> list[Report]:
    """Findings of one type, in order; a case that ended the process has one that says so."""
    options = ["--dtypes", dtype, *(["--small"] if check.quick else [])]
    options += ["--cases", *check.cases] if check.cases else []
    listed = run(f"cases.{dtype}", python("gpu_parity.py", "--list", *options), check, 300)
    if listed.code != 0:
        return [not_run(f"all, {dtype}", listed.failure)]
    names = listed.output.splitlines()
    path = check.out / f"parity.{dtype}.jsonl"
    path.write_text("", encoding="utf-8")
    options += ["--device", check.device, *check.library_options, "--json", str(path)]
    findings: list[Report] = []
    for attempt in range(MOST_RESTARTS):
        if len(findings) == len(names):
            break
        start = names[len(findings)]
        outcome = run(f"parity.{dtype}.{attempt}", python("gpu_parity.py", *options, "--from-case", start), check)
        findings = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if len(findings) < len(names) and outcome.code != ERROR:
            findings.append(not_run(names[len(findings)], outcome.failure))
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(findings[-1]) + "\n")
    return findings + [
        not_run(name, "not run: too many cases before it ended the process") for name in names[len(findings) :]
    ]


def not_run(case: str, message: str) -> Report:
    return {"case": case, "passed": False, "error": 0.0, "allowed": 0.0, "sums_error": 0.0, "message": message}


def check_sanitizer(check: Check) -> None:
    """compute-sanitizer's memcheck and racecheck on the short cases."""
    tool = find_sanitizer() if check.on_gpu else None
    for kind in ("memcheck", "racecheck"):
        if tool is None:
            reason = (
                "compute-sanitizer is neither on PATH nor in CUDA's folder or packages"
                if check.on_gpu
                else "needs a GPU"
            )
            check.add(kind, NOT_FOUND if check.on_gpu else SKIPPED, reason)
            continue
        cases = ["--small", "--dtypes", *check.dtypes, *(["--cases", *check.cases] if check.cases else [])]
        program = python("gpu_parity.py", *cases, "--device", check.device, *check.library_options)
        options = ["--tool", kind, "--error-exitcode", FOUND_ERRORS]
        options += ["--report-api-errors", "no"] if kind == "memcheck" else []
        outcome = run(kind, [tool, *options, *program], check)
        found = [line.strip("= ") for line in outcome.output.splitlines() if "SUMMARY" in line]
        summary = found[-1] if found else outcome.failure
        check.add(kind, PASSED if outcome.code == 0 else FAILED, f"{summary} ({outcome.seconds:.0f} s)")


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer: on PATH, of the CUDA toolkit, or of NVIDIA's packages for Python."""
    roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    roots += ["/usr/local/cuda", *map(str, sorted(Path("/usr/local").glob("cuda-*"), reverse=True))]
    folders = [Path(root) / part for root in roots if root for part in ("bin", "compute-sanitizer")]
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    folders += [path.parent for path in packages.rglob("compute-sanitizer") if path.is_file()]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)])
    return shutil.which("compute-sanitizer", path=path)


def bench_operator(check: Check) -> None:
    """The operator alone: prompts, decode, and decode whose launches are replayed as a CUDA graph."""
    for name, options in (
        ("prompts", ["--work", "prompt"]),
        ("decode", ["--work", "decode"]),
        ("decode, CUDA graph", ["--work", "decode", "--cuda-graph"]),
    ):
        step = f"operator: {name}"
        if not check.on_gpu:
            check.add(step, SKIPPED, "needs a GPU")
            continue
        path = check.out / f"operator.{name.replace(', ', '.').replace(' ', '_')}.json"
        quick = ["--quick", *(["--lengths", "4096"])] if check.quick else []
        command = python("bench_attention.py", "--device", check.device, *check.library_options, *options, *quick)
        outcome = run(path.stem, [*command, "--json", path], check)
        measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        check.measurements[step] = measured
        ratios = ratios_of(measured.get("summary", {}))
        if outcome.code == 0:
            check.markdown.append(outcome.output.strip())
            check.add(step, PASSED, (ratios or "nothing fits into the GPU's memory") + left_out(measured))
        else:
            check.add(step, FAILED, f"{outcome.failure}; measured before: {ratios or 'nothing'}")


def left_out(measured: Report) -> str:
    """What wasn't measured, in words."""
    workloads = measured.get("workloads", [])
    skipped = sum("skipped" in workload for workload in workloads)
    failed = {name: text for workload in workloads for name, text in workload.get("failures", {}).items()}
    parts = [f"{skipped} of {len(workloads)} skipped for lack of memory"] if skipped else []
    return "".join(f"; {part}" for part in [*parts, *(f"{name} fails: {text}" for name, text in failed.items())])


def ratios_of(summary: Report) -> str:
    """Geometric means of times, in words."""
    pairs = [pair for of_work in summary.values() for pair in of_work.items()]
    return ", ".join(f"{pair} {found['geometric_mean']:.2f} (worst {found['worst']:.2f})" for pair, found in pairs)


STEPS = {
    "environment": check_environment,
    "library": check_library,
    "parity": check_parity,
    "sanitizer": check_sanitizer,
    "operator": bench_operator,
}
