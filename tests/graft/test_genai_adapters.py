"""Grafted folders whose calibrations onnxruntime-genai switches between generators, as adapters."""

from __future__ import annotations

from dataclasses import replace

import pytest
from foreign_models import CALIBRATION, Decoder
from genai_folders import ENGINES, PROMPT, STEPS, generator, model, og, steps

from act_export.graft.job import graft
from act_export.runtime import Session, generate

OTHER = replace(CALIBRATION, beta=1.9, gamma=4.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_three_adapters_take_turns(engine, tmp_path):
    plain = Decoder(layers=3, packed=False).save_folder(tmp_path / "plain")
    graft(plain, {"one": CALIBRATION, "two": OTHER}, tmp_path / "out", native=engine == "native")
    with Session.open(tmp_path / "out", native=engine == "native", threads=1) as session:
        expected = {
            name: generate(session, [PROMPT], max_new_tokens=STEPS, calibration=name)[0]
            for name in session.calibrations
        }
    adapters = og.Adapters(model(tmp_path / "out"))
    for name in expected:
        adapters.load(str(tmp_path / "out" / "adapters" / f"{name}.onnx_adapter"), name)
    for name in ("two", None, "plain", "one", "two"):
        running = generator(tmp_path / "out", ())
        if name is not None:
            running.set_active_adapter(adapters, name)
        running.append_tokens([PROMPT])
        assert steps(running)[0] == expected[name or "one"]
    assert expected["plain"] == steps(generator(plain))[0]
    assert len({*map(tuple, expected.values())}) == 3
