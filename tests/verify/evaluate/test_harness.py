from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluation import Evaluation
from tiny import tiny_tokenizer

from act_export.errors import ActExportError
from act_export.runtime import Session, generate
from act_export.tasks import EncodedExample, encode_examples, read_examples
from act_export.tasks.language_model import SessionLanguageModel
from act_export.tasks.scoring import score_choices

pytest.importorskip("lm_eval", reason="needs act-export[lm-eval]")

from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from act_export.verify.evaluate.harness import MODEL_TYPE, ActOnnxLM, run_harness

TOKENIZER = tiny_tokenizer()
CHOOSING = """
task: tiny_choosing
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""
WRITING = """
task: tiny_writing
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "x"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
PERPLEXITY = """
task: tiny_perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: word_perplexity}]
"""


@pytest.fixture(scope="module")
def exported(tiny_file, checkpoint_folder, tmp_path_factory) -> Path:
    """A folder as act-export writes it: model and tokenizer."""
    folder = tmp_path_factory.mktemp("exported")
    for file in (*tiny_file.parent.iterdir(), *checkpoint_folder.glob("*token*")):
        shutil.copy2(file, folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for i in range(6):
            row = {"prompt": f"{i} lights, {i % 4} ships", "choices": [" a", " bcd", " bce"], "answer": i % 3}
            file.write(json.dumps(row) + "\n")
    for name, text in (("choosing", CHOOSING), ("writing", WRITING), ("perplexity", PERPLEXITY)):
        (folder / f"{name}.yaml").write_text(text.replace("ROWS", str(rows)))
    return folder


@pytest.fixture(scope="module")
def results(exported, tasks, tmp_path_factory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        found = simple_evaluate(
            model=MODEL_TYPE,
            model_args={"path": str(exported)},
            tasks=["tiny_choosing", "tiny_writing", "tiny_perplexity"],
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            batch_size=4,
            bootstrap_iters=0,
        )
    assert found is not None
    return dict(found)


@pytest.fixture(scope="module")
def model(exported) -> ActOnnxLM:
    return ActOnnxLM(str(exported))


def ask(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def test_the_model_type_is_known() -> None:
    assert get_model(MODEL_TYPE) is ActOnnxLM
    assert get_model("dummy") is not None  # the harness's own are still there


def test_a_device_that_is_none(exported) -> None:
    with pytest.raises(ActExportError, match="device is 'gpu'; pass cpu, cuda or cuda:N"):
        ActOnnxLM(str(exported), onnx_device="gpu")
    assert ActOnnxLM(str(exported), device="cuda:0").session.device.kind == "cpu"  # the harness's default


def test_choices_have_the_log_likelihoods_of_act_export(results, exported, tasks) -> None:
    examples = read_examples(tasks / "rows.jsonl").examples
    with Session.open(exported) as session:
        scores = score_choices(SessionLanguageModel(session), encode_examples(TOKENIZER, examples))
    mine = Evaluation.of(scores, [example.answer for example in examples])
    samples = sorted(results["samples"]["tiny_choosing"], key=lambda sample: sample["doc_id"])
    for sample, row in zip(samples, mine.log_likelihoods, strict=True):
        theirs = [float(response[0]) for response in sample["filtered_resps"]]
        assert theirs == pytest.approx(row, abs=1e-5, rel=1e-5)
    assert results["results"]["tiny_choosing"]["acc,none"] == pytest.approx(mine.accuracy)
    assert results["config"]["calibrated_heads"] == 3


def test_answers_are_those_of_generate(results, exported, tasks) -> None:
    examples = read_examples(tasks / "rows.jsonl").examples
    with Session.open(exported) as session:
        prompts = [TOKENIZER(example.prompt).input_ids for example in examples]
        said = generate(session, prompts, max_new_tokens=12, stop_tokens={TOKENIZER.eos_token_id})
    texts = [TOKENIZER.decode(tokens, skip_special_tokens=True) for tokens in said]
    samples = sorted(results["samples"]["tiny_writing"], key=lambda sample: sample["doc_id"])
    answers = [sample["resps"][0][0] for sample in samples]
    assert answers == [text.split("e")[0].split("\n")[0] for text in texts]
    assert any(answers)


def test_texts_are_scored_after_the_first_token_in_windows(exported) -> None:
    text = "One light, two ships and a long way to go."
    tokens = tuple(TOKENIZER(text, add_special_tokens=False).input_ids)
    short = ActOnnxLM(str(exported), max_length=16)
    windows = [((1,), tokens[:16]), (tokens[15:16], tokens[16:32])]
    windows.append((tokens[len(tokens) - 17 : 32], tokens[32:]))  # all the context there is room for
    scorer = SessionLanguageModel(short.session)
    expected = sum(score_choices(scorer, [EncodedExample(context, (rest,), 0)])[0][0] for context, rest in windows)
    assert short.loglikelihood_rolling([ask(text), ask(text)], disable_tqdm=True) == pytest.approx(
        [expected] * 2, abs=1e-5, rel=1e-5
    )


def test_perplexity_of_a_task(results, model, tasks) -> None:
    texts = [example.prompt for example in read_examples(tasks / "rows.jsonl").examples]
    scored = model.loglikelihood_rolling([ask(text) for text in texts], disable_tqdm=True)
    samples = sorted(results["samples"]["tiny_perplexity"], key=lambda sample: sample["doc_id"])
    assert [float(sample["filtered_resps"][0]) for sample in samples] == pytest.approx(scored, abs=1e-4, rel=1e-5)


def test_a_context_that_is_too_long_is_cut_on_the_left(exported) -> None:
    short = ActOnnxLM(str(exported), max_length=8)
    long = "x" * 30 + "abcdefg"  # seven tokens, and the first of the two that follow, are eight
    (cut,), (kept,), (other,) = (
        short.loglikelihood([ask(text, " y")], disable_tqdm=True) for text in (long, "abcdefg", "bcdefg")
    )
    assert cut == pytest.approx(kept, abs=1e-5, rel=1e-5)
    assert cut != pytest.approx(other, abs=1e-3)
    answers = [
        short.generate_until([ask(text, {"until": [], "max_gen_toks": 3})], disable_tqdm=True)
        for text in (long, "cdefg")
    ]
    assert answers[0] == answers[1]
    with pytest.raises(ActExportError, match="a continuation has 9 tokens; sequences may have 8"):
        short.loglikelihood([ask("a", " 23456789")], disable_tqdm=True)
    with pytest.raises(ActExportError, match="may have 256 tokens, which leaves no room for the context in 8"):
        short.generate_until([ask("a", {})], disable_tqdm=True)


def test_an_empty_context_is_the_first_token(model) -> None:
    ((log_likelihood, _),) = model.loglikelihood([ask("", "ab")], disable_tqdm=True)
    tokens = tuple(TOKENIZER("ab", add_special_tokens=False).input_ids)
    ((expected,),) = score_choices(SessionLanguageModel(model.session), [EncodedExample((1,), (tokens,), 0)])
    assert log_likelihood == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_sampling_and_greedy_requests_do_not_mix(model) -> None:
    greedy = {"until": [], "max_gen_toks": 12}
    sampled = {**greedy, "do_sample": True, "temperature": 5.0}
    first, hot, again = model.generate_until(
        [ask("One light", greedy), ask("One light", sampled), ask("One light", greedy)], disable_tqdm=True
    )
    assert first == again != hot
    with pytest.raises(ActExportError, match="can't generate with num_beams; it takes until, max_gen_toks"):
        model.generate_until([ask("One", {"num_beams": 4})], disable_tqdm=True)


def test_chat_templates(model, monkeypatch) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ActExportError, match="no chat template; leave out --apply_chat_template"):
        model.apply_chat_template(messages)
    template = "<s>{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    text = model.apply_chat_template(messages)
    assert text == "<s>[Hi]>"
    assert model.tok_encode(text) == TOKENIZER(text, add_special_tokens=False).input_ids
    assert model.chat_template(True) == template


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "path is missing"),
        ({"path": "m.onnx", "pretrained": "m"}, "there is no pretrained"),
        ({"path": "m.onnx", "batch_size": "many"}, "batch_size is 'many'"),
        ({"path": "none.onnx"}, "there is no model none.onnx"),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(ActExportError, match=message):
        ActOnnxLM(**arguments)


def test_a_length_beyond_the_context(exported) -> None:
    with pytest.raises(ActExportError, match="max_length is 9999; give 2 to 256, the model's context"):
        ActOnnxLM(str(exported), max_length=9999)
    assert ActOnnxLM(str(exported), batch_size="auto").batch_size == 16
    assert ActOnnxLM(str(exported), batch_size=32, max_batch_size=8, portable=True).batch_size == 8


def test_what_the_harness_refuses_is_no_defect(exported) -> None:
    before = list(sys.argv)
    with pytest.raises(ActExportError, match="lm-evaluation-harness: Tasks not found: no_such_task"):
        run_harness(["--model", MODEL_TYPE, "--model_args", f"path={exported}", "--tasks", "no_such_task"])
    assert sys.argv == before


def test_the_command_line(exported, tasks, tmp_path) -> None:
    command = [sys.executable, "-m", "act_export", "lm-eval", "--model", MODEL_TYPE, "--batch_size", "auto"]
    command += ["--model_args", f"path={exported},portable=True", "--tasks", str(tasks / "choosing.yaml")]
    done = subprocess.run([*command, "--output_path", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "tiny_choosing" in done.stdout
    (file,) = tmp_path.rglob("results*.json")
    written = json.loads(file.read_text())
    assert written["config"]["model"] == MODEL_TYPE
    assert written["config"]["native"] is False
    assert "acc,none" in written["results"]["tiny_choosing"]
