"""Bad input to a program that prints figures ends it with a message and exit code 2, as it ends a command."""

from __future__ import annotations

import json
import runpy
import shlex
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parents[2] / "tools" / "bench"
BAD = [
    ("compare_losses.py --task notask", "there is no task 'notask'"),
    ("compare_losses.py --task mood.json --rank 4000", "there are 40 different prompts"),
    ("compare_losses.py --task mood.json --rank 8 --report 8 --model nomodel", "there is no model nomodel"),
    ("compare_methods.py --task notask", "there is no task 'notask'"),
    ("compare_methods.py --task mood.json --rank 4000", "there are 40 different prompts"),
    ("compare_methods.py --task mood.json --rank 8 --choose 8 --report 8 --model nomodel", "there is no model nomodel"),
    ("compare_methods.py --seeds first", "--seeds"),
    ("compare_methods.py --ways noway", "there is no way noway"),
    ("compare_rankings.py --task notask", "there is no task 'notask'"),
    ("compare_rankings.py --task mood.json --model nomodel", "there is no model nomodel"),
    ("compare_rankings.py --rankings 'gradient in float16'", "there is no ranking 'gradient in float16'"),
    ("do_no_harm.py nomodel", "there is no model nomodel"),
    ("do_no_harm.py {folder} norecipe", "no shipped recipe"),
    ("do_no_harm.py {folder} --text notext.txt", "can't use notext.txt: No such file"),
    ("measure_export.py --model nomodel", "there is no model nomodel"),
    ("measure_graft.py nomeasure", "nomeasure"),
    ("measure_profile.py --lengths long", "--lengths is 'long'"),
    ("measure_report.py nopage.html --browser nobrowser", "can't use nopage.html: No such file"),
    ("measure_search.py --rounds 0", "--rounds"),
    ("random_llama.py --out {folder}", "isn't an empty folder"),
    ("attention/bench_attention.py --device tpu", "tpu"),
    ("attention/roofline.py --threads 0", "--threads"),
]
NOT_HERE = {
    "check_gguf.py",  # says of each file whether it is refused
    "draw_gains.py",  # takes nothing
    "attention/attention_memory.py",  # is started by bench_attention.py
}


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_bad_input_is_told(line, message, checkpoint_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    task = {"template": "{text}:", "labels": [" bad", " good"], "answer": "mood", "path": "rows.jsonl"}
    rows = [{"text": f"text {number}", "mood": number % 2} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "mood.json").write_text(json.dumps(task), encoding="utf-8")
    program, *arguments = shlex.split(line.format(folder=checkpoint_folder))
    monkeypatch.syspath_prepend((PROGRAMS / program).parent)
    monkeypatch.setattr("sys.argv", [program, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PROGRAMS / program), run_name="__main__")
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert message in said
    assert "Traceback" not in said


def test_every_program_is_here():
    programs = {path for path in PROGRAMS.rglob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    named = {PROGRAMS / line.split()[0] for line, _ in BAD} | {PROGRAMS / name for name in NOT_HERE}
    assert programs == named
