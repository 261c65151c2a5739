"""The page of a report in Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_page import ACCURACIES, Open, Opened, _check_message, _check_request

from act_export.calibration.file import Calibration
from act_export.profile.report import TaskAccuracy, write_report
from act_export.profile.sink_profile import SinkProfile


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the report of a profile; complains at the end of every error, and of every request but the file's own."""
    contexts, pages = [], []

    def open_report(
        profile: SinkProfile,
        *,
        calibration: Calibration | None = None,
        accuracies: tuple[TaskAccuracy, ...] = ACCURACIES,
        width: int = 1200,
        scheme: str = "light",
    ) -> Opened:
        path = tmp_path / "report.html"
        write_report(profile, path, calibration=calibration, accuracies=accuracies)
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        context.set_default_timeout(10_000)
        context.set_default_navigation_timeout(60_000)  # of a slow machine
        contexts.append(context)
        page = context.new_page()
        found = Opened(page)
        pages.append(found)

        def guard(route: Any) -> None:
            if route.request.url == path.as_uri():
                route.continue_()
            else:
                found.complaints.append(f"asked for {route.request.url}")
                route.abort()

        context.route("**/*", guard)
        page.on("request", lambda request: _check_request(request.url, path, found))
        page.on("console", lambda message: _check_message(message, found))
        page.on("pageerror", lambda error: found.complaints.append(str(error)))
        page.goto(path.as_uri())
        found.ready()
        return found

    yield open_report
    complaints = [complaint for found in pages for complaint in found.complaints]
    for context in contexts:
        context.close()
    assert complaints == []
