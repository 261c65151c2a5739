"""Names of a whole checkpoint within a wrapper: of torch.compile, of data parallelism, of a trainer's own module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Modules that stand around others, anywhere in a name; no model calls a module of its own so."""

_MOST_LEVELS = 4


def unwrapped(names: Iterable[str], fits: Callable[[list[str]], bool]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names with the fewest wrappers taken off for which a model has places.

    Args:
        names: Of all stored tensors.
        fits: Whether a model has a place for each of these names.

    Returns:
        Stored name -> name without wrappers, and the wrappers that were taken off; the names as they are where they
        fit, and where no others do.
    """
    stored = list(names)
    for found, taken in _candidates(stored):
        if len(set(found)) == len(found) and fits(found):
            return dict(zip(stored, found, strict=True)), taken
    return {name: name for name in stored}, ()


def _candidates(stored: list[str]) -> Iterator[tuple[list[str], tuple[str, ...]]]:
    """The names as they are, without wrappers, then without the first parts that all of them share."""
    yield stored, ()
    parts = [name.split(".") for name in stored]
    taken = tuple(wrapper for wrapper in WRAPPERS if any(wrapper in each for each in parts))
    parts = [[part for part in each if part not in WRAPPERS] for each in parts]
    if taken:
        yield [".".join(each) for each in parts], taken
    for _ in range(_MOST_LEVELS):
        first = {each[0] for each in parts if each}
        if len(first) != 1 or any(len(each) < 3 for each in parts):
            return
        taken += tuple(first)
        parts = [each[1:] for each in parts]
        yield [".".join(each) for each in parts], taken
