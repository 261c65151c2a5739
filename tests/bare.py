"""A Python in which only some packages are installed: a program's imports of others fail as if they weren't there."""

from __future__ import annotations

import subprocess
import sys

RUNTIME = ("act_export", "numpy", "ml_dtypes", "onnxruntime")
COMMANDS = (*RUNTIME, "platformdirs", "rich", "typer", "click", "markdown_it", "mdurl", "pygments", "shellingham")

_HOOK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        if package not in installed and package not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run_bare(program: str, installed: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program's text; nothing is imported from this process."""
    text = f"installed = {installed!r}{_HOOK}{program}"
    return subprocess.run([sys.executable, "-c", text, *arguments], capture_output=True, text=True, check=False)
