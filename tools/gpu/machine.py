"""What the machine is, and its ceilings: memory copied and bfloat16 multiplied in a second. Needs PyTorch with CUDA."""

from __future__ import annotations

import subprocess
import sys

import torch
from plan import write_result

COPIED_BYTES = 4 << 30
SIDE = 8192  # of the square matrices
ROUNDS = 20


def timed(run: object, rounds: int = ROUNDS) -> float:
    """Seconds of a call on the GPU, the mean of so many after one that isn't counted."""
    assert callable(run)
    run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(rounds):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / rounds


def main() -> int:
    """Writes what is found as it comes."""
    query = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    said = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True
    )
    found: dict[str, object] = {"gpu": said.stdout.strip(), "torch": torch.__version__, "cuda": torch.version.cuda}
    write_result(found)
    source = torch.empty(COPIED_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    found["copy, GB/s"] = 2 * COPIED_BYTES / timed(lambda: target.copy_(source)) / 1e9
    write_result(found)
    left, right = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found["bfloat16, TFLOP/s"] = 2 * SIDE**3 / timed(lambda: left @ right) / 1e12
    write_result(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
