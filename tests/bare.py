"""A Python in which only some packages are installed: a program's imports of others fail as if they weren't there."""

from __future__ import annotations

import functools
import subprocess
import sys
from importlib import metadata

from packaging.requirements import Requirement

RUNTIME = frozenset({"act_export", "numpy", "ml_dtypes", "onnxruntime"})

_HOOK = """
import sys

class Finder:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        is_there = package in installed | sys.stdlib_module_names or name.startswith("_")
        return self.finder.find_spec(name, path, target) if is_there else None

sys.meta_path[:] = map(Finder, sys.meta_path)
"""


def run_bare(program: str, installed: frozenset[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program's text; nothing is imported from this process."""
    text = f"installed = {set(installed)!r}{_HOOK}{program}"
    return subprocess.run([sys.executable, "-c", text, *arguments], capture_output=True, text=True, check=False)


@functools.cache
def installed_with(*extras: str) -> frozenset[str]:
    """Packages that can be imported where act-export is installed with some extras, by what each says it requires."""
    waiting, found = [Requirement(f"act-export[{','.join(extras)}]")], set[tuple[str, str]]()
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            if (wanted.name, extra) not in found:
                found.add((wanted.name, extra))
                requirements = map(Requirement, metadata.requires(wanted.name) or ())
                waiting += [
                    each for each in requirements if each.marker is None or each.marker.evaluate({"extra": extra})
                ]
    names = {name.lower().replace("_", "-") for name, _ in found}
    modules = metadata.packages_distributions().items()
    return RUNTIME | {
        module for module, owners in modules if names & {owner.lower().replace("_", "-") for owner in owners}
    }
