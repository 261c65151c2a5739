"""The report's page in a browser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from profiles import random_profile, some_calibration

from act_export.profile.report import TaskAccuracy
from act_export.profile.sink_profile import SinkProfile

LAYERS, HEADS = 6, 4


ACCURACIES = (
    TaskAccuracy("sst2", 240, 0.6, (0.54, 0.66), 0.75, (0.69, 0.8), 0.15, (0.08, 0.21), "PyTorch"),
    TaskAccuracy("sst2", 100, 0.6, (0.5, 0.69), 0.58, (0.48, 0.67), -0.02, None, "ONNX Runtime"),
)


@dataclass
class Opened:
    """A page, and what it did that it mustn't."""

    page: Any
    complaints: list[str] = field(default_factory=list)

    def ready(self) -> None:
        self.page.wait_for_selector("html[data-ready]", timeout=30_000)

    def choose(self, select: str, value: str) -> None:
        self.page.select_option(select, value)
        self.ready()


Open = Callable[..., Opened]


def _check_request(url: str, path: Path, found: Opened) -> None:
    if url != path.as_uri() and not url.startswith("data:"):
        found.complaints.append(f"asked for {url}")


def _check_message(message: Any, found: Opened) -> None:
    if message.type in ("error", "warning"):
        found.complaints.append(message.text)


def whole_profile(**more: Any) -> SinkProfile:
    calibration = some_calibration(LAYERS, HEADS)
    return random_profile(LAYERS, HEADS, ("sst2", "boolq"), calibration=calibration, **more)


def tooltip(page: Any) -> dict[str, str]:
    page.wait_for_selector("#tooltip:not([hidden])")
    names, values = (page.locator(f"#tooltip {tag}").all_inner_texts() for tag in ("dt", "dd"))
    return dict(zip(names, values, strict=True))
