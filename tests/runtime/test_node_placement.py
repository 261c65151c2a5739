"""Which provider runs each node, as ONNX Runtime's profile says."""

from __future__ import annotations

import json
import os

import pytest
from tiny import CALIBRATION

from act_export.errors import SessionError
from act_export.runtime import Session
from act_export.runtime.node_placement import read_profile


def event(name: str, operator: str, provider: str) -> dict:
    arguments = {"op_name": operator, "provider": provider}
    return {"cat": "Node", "name": f"{name}_kernel_time", "args": arguments}


def test_a_session_on_the_cpu(tiny_session, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    placement = tiny_session.placement()
    assert set(placement.operators) == {"CPUExecutionProvider"}
    assert placement.copies == 0
    assert placement.attention_on_device
    assert len(placement.attention) == (len(CALIBRATION.heads) if tiny_session.native else 0)
    assert placement.operators["CPUExecutionProvider"].get("CalibratedAttention", 0) == len(placement.attention)
    words = "attention nodes: 2 of 2 on CPU" if tiny_session.native else "attention by standard operators"
    assert placement.describe().startswith(words)
    assert os.listdir(tmp_path) == []


def test_a_closed_session(tiny_file) -> None:
    with Session.open(tiny_file) as session:
        pass
    with pytest.raises(SessionError, match="was closed"):
        session.placement()


def test_a_profile_of_a_gpu() -> None:
    cuda, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    events = [
        {"cat": "Session", "name": "model_loading_uri", "args": {}},
        {"cat": "Node", "name": "first_fence_before", "args": {"op_name": "Attention"}},
        event("first", "CalibratedAttention", cuda),
        event("first", "CalibratedAttention", cuda),  # of a second run
        event("second", "Attention", cpu),
        event("product", "MatMul", cuda),
        event("to", "MemcpyToHost", cuda),
        event("from", "MemcpyFromHost", cuda),
        event("size", "Sub", cpu),
    ]
    placement = read_profile(json.dumps(events), "cuda:0")
    assert placement.attention == {"first": cuda, "second": cpu}
    assert placement.operators == {cuda: {"CalibratedAttention": 1, "MatMul": 1}, cpu: {"Attention": 1, "Sub": 1}}
    assert placement.copies == 2
    assert not placement.attention_on_device
    assert placement.on_cpu == {"Attention": 1, "Sub": 1}
    assert placement.describe() == (
        "attention nodes: 1 of 2 on CUDA, 1 of 2 on CPU; nodes: 2 on CUDA, 2 on CPU; on the CPU: 1 Attention, 1 Sub; "
        "Memcpy nodes: 2"
    )
