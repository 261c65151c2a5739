#!/usr/bin/env python3
"""Writes the recipes of the heads that the paper's authors published, from a clone of their repository.

    .venv/bin/python tools/published_recipes.py CLONE [--revision REVISION] [--out FOLDER]

CLONE is a git clone of https://github.com/GATECH-EIC/ACT. Only its lists of heads are read; none of its code is run.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_export.calibration.file import Calibration, ModelIdentity, Provenance
from act_export.calibration.recipes import PUBLISHED, recipes_folder
from act_export.errors import ActExportError

PAPER = "Yu et al., ICML 2024, arXiv 2406.15765"
REPOSITORY = "https://github.com/GATECH-EIC/ACT"
LISTS = "models/augment_index.py"
FIRST_LAYER = 2  # the lists' first entry
BETA, THRESHOLD = 0.4, 0.1  # scripts/evaluation.sh
CLASSIFICATION = ("sst2", "sst5", "mr", "subj", "agnews", "trec", "cb", "boolq", "dbpedia")
MULTIPLE_CHOICE = ("hellaswag", "arc_easy", "piqa", "arc_challenge", "obqa", "copa", "csqa")
LLAMA = ModelIdentity("llama", 32, 32, name="meta-llama/Llama-2-7b-chat-hf")
MISTRAL = ModelIdentity("mistral", 32, 32, name="mistralai/Mistral-7B-Instruct-v0.2")
NOT_REACHED = {
    "llama": "As released, main.py replaces the attention of the repository's own Llama classes, but a later star "
    "import makes it load transformers' Llama, which stays as it was. (Read, not run.)",
    "mistral": "As released, main.py replaces the attention of the repository's own Llama classes, but loads "
    "transformers' Mistral, which stays as it was; and a second function of the same name hides the one with this "
    "list. (Read, not run.)",
}


@dataclass(frozen=True)
class Published:
    """One of the lists.

    Attributes:
        variable: Its name.
        model: The model it is for.
        tasks: What its heads were found on.
        layers: Which of its entries the released code uses.
    """

    variable: str
    model: ModelIdentity
    tasks: tuple[str, ...]
    layers: str


RECIPES = {
    "llama-2-7b-chat-classification": Published(
        "aug_indices_comb_classification",
        LLAMA,
        CLASSIFICATION,
        "The released Llama attention imports this list and applies it to layers 2 to 30, all that it covers.",
    ),
    "llama-2-7b-chat-multiple-choice": Published(
        "indices_comb_MC",
        LLAMA,
        MULTIPLE_CHOICE,
        "The released Llama attention imports only the classification list and stops after layer 30. With this list in "
        "its place it would leave out layer 31, which is kept here.",
    ),
    "mistral-7b-instruct-v0.2-classification": Published(
        "aug_classification_mistral",
        MISTRAL,
        CLASSIFICATION,
        "The released Mistral attention imports this list and applies it to layers 2 to 31, all that it covers.",
    ),
    "mistral-7b-instruct-v0.2-multiple-choice": Published(
        "aug_MC_mistral",
        MISTRAL,
        MULTIPLE_CHOICE,
        "The released Mistral attention imports only the classification list; it goes to layer 31, as this list does.",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("clone", type=Path, metavar="CLONE")
    parser.add_argument("--revision", default="HEAD")
    parser.add_argument("--out", type=Path, default=recipes_folder(), metavar="FOLDER")
    arguments = parser.parse_args()
    try:
        commit = git(arguments.clone, "rev-parse", f"{arguments.revision}^{{commit}}").strip()
        lists = lists_of_heads(git(arguments.clone, "show", f"{commit}:{LISTS}"))
        recipes = {name: recipe(published, lists, commit) for name, published in RECIPES.items()}
    except ActExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, calibration in recipes.items():
        path = arguments.out / f"{name}.json"
        calibration.save(path)
        print(f"{path}: {calibration.num_calibrated_heads} heads in {len(calibration.heads)} layers")
    return 0


def git(clone: Path, *arguments: str) -> str:
    """What git prints.

    Raises:
        ActExportError: With git's own words, if it fails.
    """
    result = subprocess.run(["git", "-C", str(clone), *arguments], capture_output=True, text=True)
    if result.returncode:
        raise ActExportError(f"git {' '.join(arguments)} in {clone}: {result.stderr.strip()}")
    return result.stdout


def lists_of_heads(source: str) -> dict[str, Any]:
    """The constants that a Python file assigns, by name; nothing is run."""
    constants = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = ast.literal_eval(node.value)
    return constants


def recipe(published: Published, lists: dict[str, Any], commit: str) -> Calibration:
    """The recipe of one list.

    Raises:
        ActExportError: If the list isn't there, or has layers or heads that the model doesn't have.
    """
    if published.variable not in lists:
        raise ActExportError(f"{LISTS} has no list {published.variable}; it has {', '.join(lists) or 'none'}")
    heads = {FIRST_LAYER + index: tuple(sorted(found)) for index, found in enumerate(lists[published.variable])}
    calibration = Calibration(
        heads=heads,
        beta=BETA,
        threshold=THRESHOLD,
        model=published.model,
        provenance=Provenance(
            method=PUBLISHED,
            tasks=published.tasks,
            notes={
                "list": f"{published.variable} of {LISTS}; its first entry is layer {FIRST_LAYER}, counted from 0",
                "released_code": f"{published.layers} {NOT_REACHED[published.model.architecture]}",
                "measured": "not by act-export",
            },
            source={"paper": PAPER, "repository": REPOSITORY, "commit": commit},
        ),
    )
    calibration.check_fits(published.model)
    return calibration


if __name__ == "__main__":
    sys.exit(main())
