"""A calibration that is searched because none was given: its name, what is proposed, and whether it is used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_tokenizer

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration
from act_export.search.resolve import CalibrationRequest, resolve_calibrations
from act_export.search.results import Gain
from act_export.tasks import Questions
from act_export.tasks.questions import MIX


def with_tokenizer(checkpoint):
    return replace(checkpoint, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    ("task", "name"), [("sst2", "sst2"), ("my data, 2", "my-data-2"), ("plain", "calibrated"), ("…", "calibrated")]
)
def test_what_a_searched_calibration_is_called(tiny, monkeypatch, task, name):
    found = SimpleNamespace(calibrations={task: Calibration({0: (1,)})})
    monkeypatch.setattr("act_export.search.resolve.run_search", lambda *_, **__: found)
    request = CalibrationRequest(questions=Questions((), (Path("rows.jsonl"),)))
    assert list(resolve_calibrations(with_tokenizer(tiny), request)) == [name]
    assert CalibrationSet.of(resolve_calibrations(with_tokenizer(tiny), request)).default == name


@pytest.mark.parametrize(("beta", "methods"), [(None, ("act", "fit")), (0.2, ("act",))])
def test_a_search_that_is_given_a_beta_proposes_it_alone(tiny, monkeypatch, beta, methods):
    asked = []

    def run_search(_, job, **__):
        asked.append(job.options)
        return SimpleNamespace(calibrations={"rows": Calibration({})})

    monkeypatch.setattr("act_export.search.resolve.run_search", run_search)
    request = CalibrationRequest(questions=Questions((), (Path("rows.jsonl"),)), beta=beta)
    resolve_calibrations(with_tokenizer(tiny), request)
    assert [(options.methods, options.betas) for options in asked] == [(methods, (beta or 0.4,))]


@pytest.mark.parametrize(
    ("heads", "average", "of_tasks", "used", "said"),
    [
        ({0: (1,)}, (0.01, 0.05), [(-0.03, 0.02), (0.02, 0.1)], True, "+3.0 points (+1.0 to +5.0) on average, +1.0"),
        ({0: (1,)}, (-0.01, 0.05), [(-0.03, 0.02), (0.02, 0.1)], False, "but that may be luck: this is the plain"),
        ({0: (1,)}, (0.01, 0.05), [(-0.03, -0.01), (0.02, 0.1)], False, "but it loses on rte: this is the plain"),
        ({}, None, [None, None], False, "no set of heads serves the mix of tasks better than luck explains"),
    ],
)
def test_without_a_recipe_one_set_is_used_where_it_gains_and_no_task_loses(
    tiny, monkeypatch, heads, average, of_tasks, used, said
):
    def gain(interval):
        return None if interval is None else Gain(0.5, sum(interval) / 2, interval, None)

    joint = Calibration(heads)
    found = SimpleNamespace(
        joint=joint,
        joint_average=gain(average),
        joint_beyond=gain((-0.01, 0.03)),
        reports={name: SimpleNamespace(joint=gain(of)) for name, of in zip(("rte", "sst2"), of_tasks, strict=True)},
    )
    jobs = []
    monkeypatch.setattr("act_export.search.resolve.run_search", lambda _, job, **__: jobs.append(job) or found)
    notices: list[str] = []
    resolved = resolve_calibrations(with_tokenizer(tiny), CalibrationRequest(), notice=notices.append)
    assert resolved == ({"mix": joint} if used else {})
    assert said in notices[-1]
    assert "searching one set of heads for sst2, rte, csqa, arc_easy, obqa; --plain leaves it" in notices[0]
    (job,) = jobs
    assert (job.own, job.joint, job.questions.tasks) == (False, True, MIX)
