from __future__ import annotations

from itertools import product

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from act_export.calibration.file import Calibration, ModelIdentity
from act_export.search.proposals import (
    first_heads_by_beta,
    first_heads_by_gamma,
    fitted,
    other_heads,
    strengths_by_head,
)
from act_export.search.request import Threshold

MODEL = ModelIdentity("llama", 3, 4, "sha256:0")
THRESHOLD = Threshold(3.0, "relative")
effects_of_heads = st.lists(st.integers(-9, 9), min_size=12, max_size=12, unique=True).map(
    lambda values: torch.tensor(values, dtype=torch.float64).view(3, 4)
)


def betas_of(calibration: Calibration) -> dict[tuple[int, int], float]:
    return {head: beta for head, (beta, _) in strengths_by_head(calibration).items()}


@given(effects=effects_of_heads, counts=st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_candidates_are_the_heads_with_the_largest_positive_effects(effects: torch.Tensor, counts: list[int]) -> None:
    helpful = int((effects > 0).sum())
    candidates = [p.calibration for p in first_heads_by_beta({0.4: effects}, counts, THRESHOLD, MODEL)]
    sizes = [candidate.num_calibrated_heads for candidate in candidates]
    assert sizes == sorted({min(count, helpful) for count in counts} - {0})
    for size, candidate in zip(sizes, candidates, strict=True):
        assert (candidate.beta, candidate.threshold, candidate.threshold_mode) == (0.4, 3.0, "relative")
        assert candidate.model == MODEL
        chosen = {effects[layer, head].item() for layer, heads in candidate.heads.items() for head in heads}
        assert chosen == set(sorted(effects.flatten().tolist())[-size:])


@given(
    effects=st.dictionaries(st.sampled_from([0.0, 0.4, 1.2, 1.7]), effects_of_heads, min_size=1),
    counts=st.sets(st.integers(1, 14), min_size=1, max_size=3),
)
def test_each_beta_is_tried_alone_and_with_each_on_the_other_side_of_1(
    effects: dict[float, torch.Tensor], counts: set[int]
) -> None:
    candidates = [p.calibration for p in first_heads_by_beta(effects, sorted(counts), THRESHOLD, MODEL)]
    weak, strong = ([beta for beta in effects if (beta < 1) == below] for below in (True, False))
    expected = set()
    for way in [*((beta,) for beta in effects), *product(weak, strong)]:
        best = {
            divmod(index, 4): max((effects[beta].flatten()[index].item(), -beta, beta) for beta in way)
            for index in range(12)
        }
        for first, second in product(way, way):  # of equal effects either may be taken
            assume(first == second or not (effects[first] == effects[second]).any())
        ordered = sorted(best, key=lambda head: -best[head][0])
        assume(len({value for value, *_ in best.values()}) == 12)
        for count in counts:
            helpful = [head for head in ordered if best[head][0] > 0][:count]
            if helpful:
                expected.add(frozenset((head, best[head][2]) for head in helpful))
    found = [frozenset(betas_of(candidate).items()) for candidate in candidates]
    assert set(found) == expected
    assert len(found) == len(expected)
    for candidate in candidates:
        assert isinstance(candidate.beta, float) == (len(set(betas_of(candidate).values())) == 1)


def test_nothing_is_proposed_where_no_head_helps() -> None:
    effects = {0.4: torch.zeros(3, 4), 1.5: torch.full((3, 4), float("-inf"))}
    assert first_heads_by_beta(effects, (1, 5), THRESHOLD, MODEL) == []
    assert first_heads_by_gamma(torch.zeros(3, 4), (0.5,), (1, 5), THRESHOLD, MODEL) == []
    assert fitted({3: torch.full((2, 3, 4), 1.001, dtype=torch.float64)}, "", THRESHOLD, MODEL) == []


@given(slope=effects_of_heads, count=st.integers(1, 12))
def test_by_gamma_each_head_goes_the_way_that_helps(slope: torch.Tensor, count: int) -> None:
    (found,) = first_heads_by_gamma(slope, (0.5,), (count,), THRESHOLD, MODEL)
    largest = sorted(slope.abs().flatten().tolist(), reverse=True)[: min(count, int((slope != 0).sum()))]
    strengths = strengths_by_head(found.calibration)
    assert sorted((abs(slope[head].item()) for head in strengths), reverse=True) == largest
    for head, pair in strengths.items():
        assert pair == (1.0, 2.0 if slope[head] > 0 else 0.5)


def test_gamma_and_its_inverse_are_the_same_proposal() -> None:
    slope = torch.arange(-6.0, 6.0).view(3, 4)
    found = first_heads_by_gamma(slope, (0.5, 2.0, 0.25), (2, 100), THRESHOLD, MODEL)
    assert [proposal.label for proposal in found] == [
        "gamma: 2 heads, gamma 0.5",
        "gamma: 11 heads, gamma 0.5",
        "gamma: 2 heads, gamma 0.25",
        "gamma: 11 heads, gamma 0.25",
    ]


def test_a_fit_touches_the_heads_whose_strengths_are_not_about_one() -> None:
    strengths = torch.ones(2, 3, 4, dtype=torch.float64)
    strengths[0, 1, 2], strengths[1, 2, 0], strengths[1, 0, 0] = 0.5, 1.25, 1.0001
    (found,) = fitted({3: strengths}, "", THRESHOLD, MODEL)
    assert (found.method, found.label) == ("fit", "fit: 2 heads after 3 steps")
    assert strengths_by_head(found.calibration) == {(1, 2): (0.5, 1.0), (2, 0): (1.0, 1.25)}


@given(
    heads=st.dictionaries(st.integers(0, 2), st.sets(st.integers(0, 3), min_size=1).map(sorted).map(tuple), min_size=1),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_random_heads_are_as_many_with_the_same_strengths(
    heads: dict[int, tuple[int, ...]], data: st.DataObject, seed: int
) -> None:
    beta = {layer: tuple(data.draw(st.sampled_from([0.0, 0.4, 1.5])) for _ in of) for layer, of in heads.items()}
    gamma = {layer: tuple(data.draw(st.sampled_from([0.5, 1.0])) for _ in of) for layer, of in heads.items()}
    calibration = Calibration(heads, beta, 3.0, "relative", MODEL, gamma=gamma)
    other = other_heads(calibration, MODEL, seed=seed)
    assert sorted(strengths_by_head(other).values()) == sorted(strengths_by_head(calibration).values())
    assert (other.threshold, other.threshold_mode) == (3.0, "relative")
    other.check_fits(MODEL)
    assert other == other_heads(calibration, MODEL, seed=seed)


def test_random_heads_are_drawn_from_all() -> None:
    calibration = Calibration({0: (0, 1)}, 0.4, model=MODEL)
    drawn = [other_heads(calibration, MODEL, seed=seed) for seed in range(60)]
    assert {head for other in drawn for head in strengths_by_head(other)} == set(product(range(3), range(4)))
    assert all(other.beta == 0.4 for other in drawn)
