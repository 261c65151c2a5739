"""Prints where ONNX Runtime's CUDA provider puts the nodes of files, as JSON lines: LIBRARY FILE ...

For a process whose libraries of CUDA and driver are stand-ins; launches of kernels do nothing.
"""

import ctypes
import json
import sys
from dataclasses import asdict
from pathlib import Path

from act_export.runtime import Session, engine

library, *files = map(Path, sys.argv[1:])
driver = ctypes.CDLL("libcuda.so.1")
driver.FakeCudaAddDevice(9, 0, 132, 227 * 1024)
launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: 0)
driver.FakeCudaOnLaunch(launch)
engine.library_path = lambda: library
engine.prepare_cuda = lambda *_, **__: None  # asks the driver what the stand-in doesn't know
for file in files:
    with Session.open(file, device="cuda") as opened:
        print(json.dumps(asdict(opened.placement())))
