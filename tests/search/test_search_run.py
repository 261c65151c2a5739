"""The whole search on a tiny model, with questions that known heads answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import pytest
import torch
import transformers
from planted import CHOICES, PLANTED, planted_task, words_checkpoint, written_by

import act_export
from act_export.calibration.file import Calibration, CalibrationError
from act_export.checkpoint.load import Checkpoint
from act_export.errors import ActExportError
from act_export.search import SearchOptions, SearchTask, Threshold, search_heads
from act_export.search.answers import CHOOSE, encode_task
from act_export.search.request import RANKINGS, thresholds_of
from act_export.search.run import _planned_cost
from act_export.tasks import Example, Questions, Splits, TaskError, prompt_digest, unused

OPTIONS = SearchOptions(methods=("act",), betas=(0.0,), head_counts=(1, 2, 4, 8), confirm=4)


@pytest.fixture
def checkpoint() -> Checkpoint:
    return words_checkpoint()


@pytest.mark.parametrize("ranking", RANKINGS)
def test_planted_heads_are_found(checkpoint: Checkpoint, ranking: str) -> None:
    task = planted_task(checkpoint, PLANTED, seed=3)
    found = search_heads(checkpoint, [task], replace(OPTIONS, ranking=ranking)).calibrations["planted"]
    assert (found.heads, found.beta) == (PLANTED.heads, 0.0)
    assert (found.threshold, found.threshold_mode) == (0.1, "absolute")
    assert found.model == checkpoint.identity
    origin = found.provenance
    assert origin is not None
    assert (origin.method, origin.notes["ranking"]) == ("act", ranking)
    assert origin.tasks == ("planted",)
    assert origin.samples == {"rank": 40, "choose": 50, "report": 50}
    assert origin.seed == 3
    assert origin.versions == {
        "act-export": act_export.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    assert origin.plain_accuracy is not None
    assert origin.plain_accuracy < origin.calibrated_accuracy == 1
    low, high = origin.notes["gain_interval_95"]
    assert 0 < low <= 1 - origin.plain_accuracy <= high
    assert 0 < origin.notes["mcnemar_p"] < 0.05
    assert origin.notes["choose_p"] < 0.05
    assert origin.notes["dtype"] == "float32"
    shares = origin.notes["predicted_shares"]
    assert sum(shares["plain"]) == pytest.approx(1) == sum(shares["calibrated"])
    assert set(origin.notes["controls"]) == {"random_heads", "plain", "without_choice_bias"}
    assert len(origin.notes["controls"]["random_heads"]) == 1
    assert list(origin.notes["choose_accuracy"])[:2] == ["plain", "act: 1 head"]
    assert max(origin.notes["choose_accuracy"].values()) == origin.notes["choose_accuracy"]["act: 1 head"] == 1
    assert origin.notes["ranking_forward_passes"] > 0


def test_the_file_holds_everything_and_comes_back(checkpoint: Checkpoint) -> None:
    task = planted_task(checkpoint, PLANTED, seed=3)
    found = search_heads(checkpoint, [task], OPTIONS).calibrations["planted"]
    again = Calibration.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    assert (again.heads, again.beta, again.model) == (found.heads, found.beta, found.model)
    assert again.provenance is not None
    assert again.provenance.notes == found.provenance.notes
    again.check_fits(checkpoint.identity)
    used = found.provenance.notes["used"]
    assert used == sorted(used)
    assert set(used) == {prompt_digest(e.prompt) for e in (*task.splits.rank, *task.splits.choose)}
    assert unused(task.splits.report, used) == list(task.splits.report)
    (line,) = [line for line in found.to_json().splitlines() if '"used"' in line]
    assert line.count(",") == len(used) - 1


def test_where_nothing_helps_no_head_is_calibrated_and_that_is_said(checkpoint: Checkpoint) -> None:
    result = search_heads(checkpoint, [planted_task(checkpoint, None)], OPTIONS)
    found = result.calibrations["planted"]
    assert found.heads == {}
    assert (found.beta, found.threshold) == (0.0, 0.1)
    assert found.model == checkpoint.identity
    assert found.provenance.plain_accuracy == found.provenance.calibrated_accuracy == 1
    assert found.provenance.notes["result"].startswith("no head is calibrated")
    assert "gain_interval_95" not in found.provenance.notes
    assert found.provenance.notes["choose_p"] > 0.05
    assert len(found.provenance.notes["used"]) == 90
    report = result.reports["planted"]
    assert (report.own, report.choice_bias, report.predicted_shares, report.random_heads) == (None, None, None, ())


def test_every_head_takes_the_beta_that_suits_it(checkpoint: Checkpoint) -> None:
    planted = Calibration({0: (1, 3)}, beta={0: (1.8, 0.0)}, threshold=0.1)
    options = replace(OPTIONS, ranking="exhaustive", betas=(1.8, 0.0))
    result = search_heads(checkpoint, [planted_task(checkpoint, planted)], options)
    found = result.calibrations["planted"]
    assert (found.heads, found.beta) == (planted.heads, planted.beta)
    assert result.reports["planted"].own.accuracy == 1
    labels = result.reports["planted"].choose_accuracy
    assert labels["act: 2 heads, beta 0 and 1.8"] == 1
    assert {"plain", "act: 1 head, beta 0", "act: 1 head, beta 1.8"} <= set(labels)


@pytest.mark.parametrize("planted", [Threshold(0.2), Threshold(1.5, "relative")])
def test_the_threshold_that_suits_is_chosen(checkpoint: Checkpoint, planted: Threshold) -> None:
    """0.1 is one of them too, and comes first."""
    calibration = replace(PLANTED, threshold=planted.value, threshold_mode=planted.mode)
    options = replace(OPTIONS, thresholds=(Threshold(), Threshold(0.2), Threshold(1.5, "relative")))
    result = search_heads(checkpoint, [planted_task(checkpoint, calibration)], options)
    found = result.calibrations["planted"]
    assert (found.heads, found.threshold, found.threshold_mode) == (PLANTED.heads, planted.value, planted.mode)
    assert result.reports["planted"].own.accuracy == 1


@pytest.mark.sampled(1)
@pytest.mark.parametrize("ranking", RANKINGS)
def test_length_normalized_choices(checkpoint: Checkpoint, ranking: str) -> None:
    """The choice of four tokens would never be chosen by its whole log-likelihood."""
    choices = (" w97 w5", " w98 w9 w4 w4")
    task = planted_task(checkpoint, PLANTED, choices=choices, length_normalized=True)
    options = replace(OPTIONS, ranking=ranking)
    found = search_heads(checkpoint, [task], options)
    assert found.calibrations["planted"].heads == PLANTED.heads
    assert found.reports["planted"].own.accuracy == 1
    assert found.reports["planted"].predicted_shares[1][1] > 0.1
    otherwise = search_heads(checkpoint, [replace(task, length_normalized=False)], options)
    assert otherwise.reports["planted"].plain_accuracy != found.reports["planted"].plain_accuracy


@pytest.mark.sampled(1)
@pytest.mark.parametrize("ranking", RANKINGS)
def test_written_answers(checkpoint: Checkpoint, ranking: str) -> None:
    """Their credit is F1, between right and wrong."""
    result = search_heads(checkpoint, [written_by(checkpoint, PLANTED)], replace(OPTIONS, ranking=ranking))
    found, report = result.calibrations["written"], result.reports["written"]
    assert found.heads == PLANTED.heads
    assert report.own.accuracy == found.provenance.calibrated_accuracy == 1
    assert 0 < report.plain_accuracy < 0.5
    assert report.own.p is None
    assert "mcnemar_p" not in found.provenance.notes
    assert (report.measures, report.choice_bias, report.predicted_shares) == (None, None, None)
    assert set(report.controls) == {"plain"}


@pytest.mark.in_turn(2)
def test_batch_tokens_change_nothing_but_rounding(checkpoint: Checkpoint) -> None:
    task = planted_task(checkpoint, PLANTED)
    results = [
        search_heads(checkpoint, [task], replace(OPTIONS, ranking="gradient+confirm", batch_tokens=size))
        for size in (1, 40, 100_000)
    ]
    for result in results[1:]:
        assert result.calibrations["planted"].heads == PLANTED.heads
        assert result.calibrations["planted"].to_json() == results[0].calibrations["planted"].to_json()
        assert result.units[1] < results[0].units[1]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_search_repeats_and_leaves_the_model_alone(checkpoint: Checkpoint, checkpointing: bool) -> None:
    before = {name: parameter.clone() for name, parameter in checkpoint.model.named_parameters()}
    implementation = checkpoint.model.config._attn_implementation
    forwards = [module.forward.__func__ for module in checkpoint.model.modules()]
    tasks = [planted_task(checkpoint, PLANTED), written_by(checkpoint, PLANTED)]
    options = replace(OPTIONS, ranking="gradient+confirm", gradient_checkpointing=checkpointing)
    first, second = (search_heads(checkpoint, tasks, options) for _ in range(2))
    assert first == second
    assert checkpoint.model.config._attn_implementation == implementation
    assert [module.forward.__func__ for module in checkpoint.model.modules()] == forwards
    assert not checkpoint.model.training
    for name, parameter in checkpoint.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_the_model_is_left_alone_after_an_error_too(checkpoint: Checkpoint) -> None:
    implementation = checkpoint.model.config._attn_implementation

    def stop(step: str, done: float) -> None:
        if step.startswith("measuring"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_heads(
            checkpoint, [planted_task(checkpoint, PLANTED)], replace(OPTIONS, ranking="gradient+confirm"), progress=stop
        )
    assert checkpoint.model.config._attn_implementation == implementation
    assert search_heads(checkpoint, [planted_task(checkpoint, PLANTED)], OPTIONS).calibrations["planted"].heads


def test_padding_is_planned_for(checkpoint: Checkpoint) -> None:
    task = encode_task(checkpoint, planted_task(checkpoint, PLANTED))
    ragged = tuple(replace(each, prompt=each.prompt[: 1 + i % 5]) for i, each in enumerate(task.splits[CHOOSE]))
    task = replace(task, splits={**task.splits, CHOOSE: ragged})
    together, alone = (
        _planned_cost(checkpoint, [task], replace(OPTIONS, batch_tokens=tokens), 0, own=True, joint=False)
        for tokens in (10_000, 1)
    )
    assert together > alone


@pytest.mark.sampled(2)
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("several", [False, True])
def test_progress_reaches_the_end_and_never_runs_backwards(checkpoint: Checkpoint, ranking: str, several: bool) -> None:
    tasks = [planted_task(checkpoint, PLANTED, name=name) for name in ("one", "two")[: 2 if several else 1]]
    steps: list[tuple[str, float]] = []
    search_heads(
        checkpoint,
        tasks,
        replace(OPTIONS, ranking=ranking, betas=(0.0, 1.5), batch_tokens=200),
        progress=lambda step, done: steps.append((step, done)),
    )
    shares = [done for _, done in steps]
    assert shares == sorted(shares)
    assert (shares[0], steps[-1]) == (0, ("done", 1))
    assert shares[-2] > 0.4  # the plan isn't far off
    assert ("ranking heads" in dict(steps)) == (ranking != "exhaustive")
    assert ("measuring heads" in dict(steps)) == (ranking != "gradient")
    assert {"choosing", "measuring the gain"} <= set(dict(steps))
    assert ("choosing a joint set" in dict(steps)) == several


@pytest.mark.parametrize("ranking", RANKINGS)
def test_a_model_without_finite_scores_is_refused(checkpoint: Checkpoint, ranking: str) -> None:
    task = planted_task(checkpoint, None)
    with torch.no_grad():
        checkpoint.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ActExportError, match=r"after the prompt '[w0-9 .]+' are .*nan"):
        search_heads(checkpoint, [task], replace(OPTIONS, ranking=ranking))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ("act", "best")}, ActExportError, "no method 'best'; methods are act, gamma, fit"),
        ({"methods": ("exhaustive",)}, ActExportError, "no method 'exhaustive'; --ranking exhaustive is how heads are"),
        ({"methods": ()}, ActExportError, r"methods are \(\); name at least one"),
        (
            {"ranking": "random"},
            ActExportError,
            "no ranking 'random'; it must be gradient, gradient.conf",
        ),
        ({"gammas": (0.0,)}, CalibrationError, "gamma is 0.0; it must lie in"),
        ({"gammas": (1.0,)}, CalibrationError, "gamma is 1, which changes nothing"),
        ({"fit_steps": (3, 0)}, ActExportError, "fit_steps is 0; it must be at least 1"),
        ({"fit_l2": (-1.0,)}, ActExportError, "fit_l2 is -1.0; it must be at least 0"),
        ({"precision": "half"}, ActExportError, "precision is .half.; it must be auto or own"),
        ({"goal": "more"}, ActExportError, "the goal is 'more'; it must be accuracy or beyond-remedy"),
        ({"fit_l1": -0.1}, ActExportError, "fit_l1 is -0.1; it must be at least 0"),
        ({"betas": ()}, ActExportError, r"betas are \(\); name at least one"),
        ({"betas": (0.4, 0.4)}, ActExportError, r"betas are \(0.4, 0.4\); .* none twice"),
        ({"betas": (0.4, 3)}, CalibrationError, "beta is 3; it must lie in"),
        ({"betas": (float("nan"),)}, CalibrationError, "beta is nan"),
        ({"betas": (1.0,)}, CalibrationError, "beta is 1, which changes nothing"),
        ({"thresholds": ()}, ActExportError, r"thresholds are \(\)"),
        ({"thresholds": (Threshold(-1),)}, CalibrationError, "threshold is -1"),
        ({"thresholds": (Threshold(0.1, "absolut"),)}, CalibrationError, "threshold_mode is 'absolut'"),
        ({"head_counts": (4, 0)}, ActExportError, r"the numbers of heads are \(4, 0\); each must be at least 1"),
        ({"head_counts": (4, 4)}, ActExportError, r"head_counts are \(4, 4\); name at least one, and none twice"),
        ({"confirm": 0}, ActExportError, "confirm is 0; it must be at least 1"),
        ({"batch_tokens": 0}, ActExportError, "batch_tokens is 0; it must be at least 1"),
        ({"random_draws": -1}, ActExportError, "random_draws is -1; it must be at least 0"),
    ],
)
def test_bad_options_are_refused(options: Mapping[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SearchOptions(**options)


def test_thresholds_of_modes() -> None:
    assert thresholds_of((), None) == (Threshold(0.1),)
    assert thresholds_of((), "absolute, relative") == (Threshold(0.1), Threshold(5.0, "relative"))
    assert thresholds_of((2.0, 3.0), "relative") == (Threshold(2.0, "relative"), Threshold(3.0, "relative"))
    with pytest.raises(CalibrationError, match="threshold_mode is 'absolut'; it must be absolute or relative"):
        thresholds_of((), "absolut")
    with pytest.raises(CalibrationError, match=r"the thresholds 0\.1, 5 can't be of two modes at once"):
        thresholds_of((0.1, 5.0), "absolute,relative")


def test_what_cannot_be_searched_is_refused(checkpoint: Checkpoint) -> None:
    task = planted_task(checkpoint, None, sizes=(6, 6, 6))
    with pytest.raises(ActExportError, match="the tasks are none; name at least one"):
        search_heads(checkpoint, [])
    with pytest.raises(ActExportError, match=r"the tasks are planted, planted; .* none twice"):
        search_heads(checkpoint, [task, task])
    with pytest.raises(TaskError, match="the model has no tokenizer"):
        search_heads(replace(checkpoint, tokenizer=None), [task])
    with pytest.raises(ActExportError, match="the goal is beyond-remedy, but answers to written are generated"):
        search_heads(checkpoint, [task, written_by(checkpoint, None)], replace(OPTIONS, goal="beyond-remedy"))
    splits = task.splits
    long = Splits((Example("w5 " * 299 + "w5", CHOICES, 0),), splits.choose, splits.report)
    with pytest.raises(TaskError, match="has 301 tokens; the model takes 256"):
        search_heads(checkpoint, [SearchTask("long", long)])
    shortened = search_heads(checkpoint, [SearchTask("long", long, questions=Questions(truncate=True))], OPTIONS)
    assert shortened.reports["long"].sizes == {"rank": 1, "choose": 6, "report": 6}


def test_results_of_a_search_on_one_task_have_no_joint_set(checkpoint: Checkpoint) -> None:
    result = search_heads(checkpoint, [planted_task(checkpoint, PLANTED)], OPTIONS)
    assert (result.joint, result.average, result.joint_average) == (None, None, None)
    assert result.reports["planted"].joint is None
    assert result.units[0] == result.units[1] > 0
    assert asdict(result)["reports"]["planted"]["sizes"] == {"rank": 40, "choose": 50, "report": 50}


def test_the_joint_set_alone_is_that_of_the_whole_search(checkpoint: Checkpoint) -> None:
    tasks = [planted_task(checkpoint, PLANTED, name=name, seed=seed) for name, seed in (("one", 3), ("two", 4))]
    steps: list[tuple[str, float]] = []
    whole = search_heads(checkpoint, tasks, OPTIONS)
    alone = search_heads(checkpoint, tasks, OPTIONS, own=False, progress=lambda *step: steps.append(step))
    assert alone.joint is not None
    assert whole.joint is not None
    assert alone.joint.to_json() == whole.joint.to_json()
    assert (alone.joint_average, alone.joint_beyond) == (whole.joint_average, whole.joint_beyond)
    assert [calibration.heads for calibration in alone.calibrations.values()] == [{}, {}]
    assert alone.units[0] < whole.units[0]
    assert [done for _, done in steps] == sorted(done for _, done in steps)
    assert steps[-2][1] > 0.4  # the plan isn't far off


def test_questions_that_another_task_uses_are_not_reported_on(checkpoint: Checkpoint) -> None:
    one, other = (planted_task(checkpoint, PLANTED, name=name, seed=seed) for name, seed in (("one", 3), ("other", 4)))
    borrowed = (*one.splits.rank[:5], *one.splits.choose[:4], *other.splits.report)
    mixed = replace(other, splits=replace(other.splits, report=borrowed))
    result = search_heads(checkpoint, [one, mixed], OPTIONS)
    assert result.reports["other"].sizes["report"] == len(other.splits.report)
    assert result.reports["one"].sizes["report"] == len(one.splits.report)
    copy = replace(one, name="copy", splits=Splits(one.splits.report, one.splits.choose, one.splits.rank))
    with pytest.raises(ActExportError, match="all questions that one would be reported on are used by another task"):
        search_heads(checkpoint, [one, copy], OPTIONS)


def test_a_question_with_one_choice_needs_generation_settings(checkpoint: Checkpoint) -> None:
    splits = planted_task(checkpoint, PLANTED, seed=3).splits
    alone = Splits((Example("w3", (" w4",), 0),), splits.choose, splits.report)
    with pytest.raises(ActExportError, match=r"lonely has a question with fewer than two choices \(w3\)"):
        SearchTask("lonely", alone)


def test_confirmed_heads_of_a_joint_set_are_measured_on_every_task(checkpoint: Checkpoint) -> None:
    """Also where the tasks' own first heads have none in common."""
    tasks = [planted_task(checkpoint, PLANTED, name=name, seed=seed) for name, seed in (("one", 3), ("two", 4))]
    result = search_heads(checkpoint, tasks, replace(OPTIONS, ranking="gradient+confirm", confirm=1))
    assert result.joint is not None
    assert result.joint.num_calibrated_heads == 1
