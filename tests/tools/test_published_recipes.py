"""The tool that writes recipes of published heads, on a made-up repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from act_export.calibration.file import Calibration

TOOL = Path(__file__).parent.parent.parent / "tools" / "published_recipes.py"
LISTS = """
aug_indices_comb_classification = [[8, 2], [], [31]]
indices_comb_MC =[[1]]
aug_classification_mistral = [[], [0]]
aug_MC_mistral = [[0, 1]]
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    folder = tmp_path / "clone"
    (folder / "models").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", folder], check=True)
    return folder


def commit(clone: Path, lists: str) -> str:
    (clone / "models" / "augment_index.py").write_text(lists)
    git = ["git", "-C", clone, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "lists"], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


def test_every_list_becomes_a_recipe(clone, tmp_path):
    first = commit(clone, LISTS)
    commit(clone, LISTS.replace("31", "30"))
    result = run_tool(clone, "--out", tmp_path, "--revision", first)
    assert result.returncode == 0, result.stderr
    recipes = {path.stem: Calibration.load(path) for path in tmp_path.glob("*.json")}
    assert {name: recipe.heads for name, recipe in recipes.items()} == {
        "llama-2-7b-chat-classification": {2: (2, 8), 4: (31,)},
        "llama-2-7b-chat-multiple-choice": {2: (1,)},
        "mistral-7b-instruct-v0.2-classification": {3: (0,)},
        "mistral-7b-instruct-v0.2-multiple-choice": {2: (0, 1)},
    }
    for recipe in recipes.values():
        assert recipe.provenance is not None
        assert recipe.provenance.source["commit"] == first
        assert (recipe.beta, recipe.threshold) == (0.4, 0.1)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (LISTS.replace("aug_MC_mistral", "other"), "has no list aug_MC_mistral; it has aug_indices"),
        (LISTS.replace("31", "32"), "head 32 of layer 4 is out of range"),
    ],
)
def test_a_repository_of_another_form_is_refused(clone, tmp_path, lists, message):
    commit(clone, lists)
    result = run_tool(clone, "--out", tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert not list(tmp_path.glob("*.json"))


def test_no_repository(tmp_path):
    result = run_tool(tmp_path / "none", "--out", tmp_path)
    assert result.returncode == 2
    assert "error: git rev-parse" in result.stderr
