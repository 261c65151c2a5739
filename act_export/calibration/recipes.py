"""Recipes: the calibrations shipped in `models/`, each for one known checkpoint.

A recipe that knows the weights' fingerprint is for exactly these weights. One without, for heads that were published
without weights at hand, is used by itself only where the model goes by its name; whoever names it decides for himself.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration, CalibrationError, ModelIdentity
from act_export.calibration.search_notes import Interval, gain_beyond_control, gain_with_remedy, without_choice_bias
from act_export.calibration.strengths import CalibratedHeads
from act_export.errors import shown

PUBLISHED = "published"  # the method of heads that others found
FORMER_RANKINGS = {
    "gates": "gradient",
    "gates+confirm": "gradient+confirm",
}  # by former names
BY_NAME_ONLY = "by_name_only"  # in a recipe's notes: why it isn't used unless it is named


@dataclass(frozen=True)
class Recipe:
    """A shipped calibration.

    Attributes:
        name: What `--calibration` takes: the file's name without its suffix.
        path: The file.
        calibration: What is in it.
    """

    name: str
    path: Path
    calibration: Calibration

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks its heads were found on."""
        return self.calibration.provenance.tasks if self.calibration.provenance is not None else ()

    @property
    def by_name_only(self) -> str:
        """What it costs elsewhere, so that it isn't used unless it is named; empty where nothing is known of that."""
        origin = self.calibration.provenance
        return str(origin.notes.get(BY_NAME_ONLY, "")) if origin is not None else ""

    def describe(self) -> str:
        """Its name, the tasks, and what isn't known of it."""
        remarks = [", ".join(self.tasks)] if self.tasks else []
        origin, model = self.calibration.provenance, self.calibration.model
        if origin is not None and origin.method == PUBLISHED:
            remarks.append("heads published by others, not measured here")
        if model is not None and model.fingerprint is None:
            remarks.append(f"for {model.name or model.architecture}, whose weights can't be told from others")
        return f"{self.name} ({'; '.join(remarks)})" if remarks else self.name

    def fits_by_itself(self, model: ModelIdentity, names: Iterable[str]) -> bool:
        """Whether it is for this model; see `find_recipes`."""
        mine = self.calibration.model
        if mine is None or mine.differences(model):
            return False
        if mine.fingerprint is not None:
            return model.fingerprint is not None
        return mine.name is not None and any(_is_called(name, mine.name) for name in names)


def recipes_folder() -> Path:
    """Where the recipes are: in the package, or beside it in a source tree."""
    package = Path(__file__).parents[1]
    folder = package / "models"
    if not folder.is_dir() and (package.parent / "pyproject.toml").is_file():
        folder = package.parent / "models"
    return folder


def shipped_recipes(folder: Path | None = None) -> list[Recipe]:
    """All recipes, by name.

    Args:
        folder: Where they are; None for `recipes_folder()`.

    Raises:
        CalibrationError: If one isn't a calibration.
    """
    paths = sorted((folder or recipes_folder()).glob("*.json"), key=lambda path: path.stem)
    return [Recipe(path.stem, path, Calibration.load(path)) for path in paths]


def find_recipes(model: ModelIdentity, names: Sequence[str] = (), *, folder: Path | None = None) -> list[Recipe]:
    """The recipes for a model; the first is the one to use where nobody chooses, unless it is `by_name_only`.

    Args:
        model: The model's identity.
        names: What the model goes by, see `act_export.checkpoint.Checkpoint.names`.
        folder: As in `shipped_recipes`.

    Returns:
        Those with the model's fingerprint, and those without any that have its shape and one of its names. Those that
        may be used by themselves come first, of these the one found on the most tasks; among equals the names decide.

    Raises:
        CalibrationError: If a recipe isn't a calibration.
    """
    fitting = [recipe for recipe in shipped_recipes(folder) if recipe.fits_by_itself(model, names)]
    return sorted(fitting, key=lambda r: (bool(r.by_name_only), -len(r.tasks), r.name))


def named_recipe(given: str | os.PathLike[str], *, folder: Path | None = None) -> Recipe | None:
    """The shipped recipe that is meant; None where a file is.

    Args:
        given: A calibration file, or the name of a recipe. A file in the current folder goes before a recipe.
        folder: As in `shipped_recipes`.

    Raises:
        CalibrationError: If there is neither such a file nor such a recipe, with the names that there are.
    """
    text = os.fspath(given)
    if os.sep in text or Path(text).exists():
        return None
    recipes = {recipe.name: recipe for recipe in shipped_recipes(folder)}
    if text in recipes:
        return recipes[text]
    wanted = text.removesuffix(".json").casefold()
    near = difflib.get_close_matches(wanted, recipes, n=3, cutoff=0.5)
    near += [name for name in recipes if name.startswith(wanted) and name not in near]
    hint = f"did you mean {' or '.join(near)}?" if near else f"recipes are {', '.join(recipes) or 'none'}"
    if text.endswith(".json") and not near:
        raise CalibrationError(f"there is no calibration file {text}: act-export search writes one")
    raise CalibrationError(f"there is no calibration file {text}, and no shipped recipe of that name; {hint}")


def announce(chosen: Recipe, others: Sequence[Recipe]) -> str:
    """A line that says which recipe is used, and how to use another of the model's."""
    line = f"using the shipped recipe {chosen.describe()}"
    if others:
        names = ", ".join(other.name for other in others)
        line += f"; others for this model: {names}: --calibration {others[0].name}"
    return line


def announce_plain(recipes: Sequence[Recipe]) -> str:
    """A line that says why none of the model's recipes is used, and how to use one."""
    first = recipes[0]
    return (
        f"no calibration: the shipped recipe {first.describe()} isn't used unless it is named, because "
        f"{first.by_name_only}; --calibration {first.name} uses it"
    )


def _is_called(name: str, hub_id: str) -> bool:
    """Whether a hub id is this one, or a folder's name its last part; upper and lower case are one."""
    name, hub_id = name.casefold(), hub_id.casefold()
    return name == hub_id or ("/" not in name and name == hub_id.rpartition("/")[2])


def named_calibration(given: str) -> Calibration:
    """A calibration file, or a shipped recipe by its name.

    Raises:
        CalibrationError: If there is neither, or it can't be read.
    """
    recipe = named_recipe(given)
    return recipe.calibration if recipe is not None else Calibration.load(given)


def named_calibrations(given: Sequence[str]) -> dict[str, Calibration]:
    """Calibrations by name: files, shipped recipes, and all files of folders.

    Args:
        given: Paths, or names of recipes. A file's calibration is called as the file.

    Raises:
        CalibrationError: If one isn't there or can't be read, a folder has none, or two have the same name.
    """
    found: dict[str, Calibration] = {}
    for each in given:
        paths = sorted(str(path) for path in Path(each).glob("*.json")) if Path(each).is_dir() else [each]
        if not paths:
            raise CalibrationError(f"{each} has no calibration files (*.json)")
        for path in paths:
            name = Path(path).name.removesuffix(".json")
            if name in found:
                raise CalibrationError(f"two calibrations are called {name!r}, by their files; rename one: {path}")
            found[name] = named_calibration(path)
    return found


def describe_calibrations(calibrations: CalibrationSet, model: ModelIdentity | None, dtype: str) -> Iterator[str]:
    """What a file can be calibrated to, a line each, the default first.

    Args:
        calibrations: The file's.
        model: That the file is.
        dtype: How its weights are stored.
    """

    def described(calibration: Calibration) -> str:
        return describe_calibration(calibration, measured=is_measured_on(calibration, model, dtype))

    default = calibrations.default_calibration
    yield f"calibration: {described(default) if default is not None else 'none (plain)'}"
    if len(calibrations.names) > 1 + bool(default):
        yield f"a request can ask for {', '.join(calibrations.names)}; the default is {calibrations.default}"
    for name, calibration in calibrations.each.items():
        if name != calibrations.default:
            yield f"{name}: {described(calibration)}"
    calibrated = len(CalibratedHeads.of(calibrations.each.values()))
    if len(calibrations.heads) > calibrated:
        yield f"all {len(calibrations.heads)} heads can be calibrated, by calibrations found later too"


def is_measured_on(calibration: Calibration, model: ModelIdentity | None, dtype: str) -> bool:
    """Whether the accuracies in a calibration are of these weights.

    They are if both name the same fingerprint, and were searched on weights that are rounded as these are.

    Args:
        calibration: With the model that it was found on.
        model: The one in question.
        dtype: How its weights are stored.
    """
    found_on, origin = calibration.model, calibration.provenance
    if found_on is None or found_on.fingerprint is None or model is None or origin is None:
        return False
    rounded = dtype if dtype.startswith("int") else ""
    searched = str(origin.notes.get("weights", "")).partition(" of ")[0]  # "int4 of FILE"
    return found_on.fingerprint == model.fingerprint and searched == rounded


def describe_calibration(calibration: Calibration, *, measured: bool) -> str:
    """What a calibration does and where it came from, in a line.

    Args:
        calibration: To describe.
        measured: Whether its accuracies are of the weights in question, see `is_measured_on`; others aren't said.
    """
    knobs = [("beta", calibration.beta)] + ([("gamma", calibration.gamma)] if calibration.gamma != 1.0 else [])
    strengths = ", ".join(f"{name} {'per head' if isinstance(given, Mapping) else given}" for name, given in knobs)
    text = (
        f"{calibration.num_calibrated_heads} heads in {len(calibration.heads)} layers, {strengths}, "
        f"{calibration.threshold_mode} threshold {calibration.threshold:g}"
    )
    origin = calibration.provenance
    if origin is None:
        return text
    method = FORMER_RANKINGS.get(origin.method, origin.method)
    text += f"; {method} {'for' if origin.source else 'on'} {', '.join(origin.tasks)}"
    if origin.plain_accuracy is None or origin.calibrated_accuracy is None:
        return text + ("; not measured here" if origin.source else "")
    if not measured:
        tasks = "".join(f" --{'data' if task.endswith('.jsonl') else 'task'} {task}" for task in origin.tasks)
        return text + f"; found on other weights, unmeasured here: act-export eval FILE{tasks}"
    text += (
        f"; held-out accuracy {origin.plain_accuracy:.1%} plain, {origin.calibrated_accuracy:.1%} calibrated"
        f" ({origin.samples.get('report', 0)} prompts, PyTorch, where the heads were found)"
    )
    return text + _beyond_control(origin.notes)


def _beyond_control(notes: Mapping[str, Any]) -> str:
    """What a search measured beyond the plain model's best cheap remedy; empty where the notes don't say."""
    if (beyond := gain_beyond_control(notes)) is not None:
        among = _among(beyond.interval)
        over = f"the best control, {shown(beyond.control)}" if beyond.control else "the best controls"
        return f"; beyond {over}: {100 * beyond.gain:+.1f} points{among}{_with_remedy(notes)}"
    if (unbiased := without_choice_bias(notes)) is not None:
        plain, calibrated = unbiased
        return f"; with the choice bias taken off both: {100 * (calibrated - plain):+.1f} points"
    return ""


def _with_remedy(notes: Mapping[str, Any]) -> str:
    """The same with that remedy on both models; empty where there is none or the notes don't say."""
    gain = gain_with_remedy(notes)
    if gain is None or gain.control == "plain":
        return ""
    return f", with that remedy on both: {100 * gain.gain:+.1f}{_among(gain.interval)}"


def _among(interval: Interval | None) -> str:
    return "" if interval is None else f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"
