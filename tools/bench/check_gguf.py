#!/usr/bin/env python
"""Compares GGUF files with what they are converted to: python tools/bench/check_gguf.py FILE|NAME...

For each file, or built-in model: its tensors by quantisation, how many parameters they account for, the largest
difference of a weight and of a rotary frequency, and the time that conversion and comparison take.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from act_export.checkpoint.gguf.built_in import BUILT_IN, built_in_gguf
from act_export.checkpoint.gguf.convert import converted, remarks_of
from act_export.checkpoint.gguf.witness import compare
from act_export.commands.console import run_program
from act_export.errors import CheckpointError


def check(source: str) -> bool:
    try:
        path = built_in_gguf(source) if source in BUILT_IN else Path(source)
        start = time.perf_counter()
        folder = converted(path)
        between = time.perf_counter()
        report = compare(path, folder)
        end = time.perf_counter()
    except CheckpointError as error:
        print(f"{source}: refused: {error}")
        return False
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds.items())
    tied = ", the output's tied to the embedding" if report.tied else ""
    print(f"{source}: {report.architecture}, {report.tensors} tensors ({kinds})")
    print(f"  for {report.parameters} parameters{tied}; {report.keys} keys, {report.settings} settings")
    print(f"  largest difference {report.largest_difference:g} ({report.where}), rotary {report.rotary_difference:.1e}")
    print(f"  converted, or found whole, in {between - start:.1f} s; compared in {end - between:.1f} s")
    for remark in remarks_of(folder):
        print(f"  note: {remark}")
    return True


def main() -> int:
    if not sys.argv[1:] or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    checked = [check(source) for source in sys.argv[1:]]
    return 0 if all(checked) else 1


if __name__ == "__main__":
    run_program(main)
