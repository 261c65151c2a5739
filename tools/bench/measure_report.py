#!/usr/bin/env python3
"""Size of a report, and how long a browser takes until all its figures are drawn.

    tools/bench/measure_report.py REPORT.html [--repeats N] [--browser PROGRAM]

Prints the size of the page, how much of it is the plotting library, and, from opening the file in headless Chromium to
the last figure, the median and the range over several new browser windows.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from statistics import median

from act_export.commands.console import run_program

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="what `act-export profile` wrote")
    parser.add_argument("--repeats", type=int, default=5, help="windows (default: %(default)s)")
    parser.add_argument("--browser", help="default: chromium or google-chrome, whichever is on the PATH")
    arguments = parser.parse_args()
    browser = arguments.browser or shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        parser.error("there is no chromium or google-chrome on the PATH; pass --browser")
    text = arguments.report.read_text(encoding="utf-8")
    library = max((len(part.partition("</script>")[0].encode()) for part in text.split("<script>")[1:]), default=0)
    size = len(text.encode())
    print(
        f"page {size / 1e6:.2f} MB: plotting library {library / 1e6:.2f} MB, the rest {(size - library) / 1e6:.2f} MB"
    )
    seconds = time_to_figures(arguments.report, browser, arguments.repeats)
    print(
        f"all figures after {median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}, {len(seconds)} windows)"
    )
    return 0


def time_to_figures(report: Path, browser: str, repeats: int) -> list[float]:
    from playwright.sync_api import sync_playwright

    seconds = []
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=browser, args=ARGUMENTS)
        for _ in range(repeats):
            page = running.new_context().new_page()
            began = time.perf_counter()
            page.goto(report.resolve().as_uri())
            page.wait_for_selector("html[data-ready]", timeout=120_000)
            seconds.append(time.perf_counter() - began)
            page.context.close()
        running.close()
    return seconds


if __name__ == "__main__":
    run_program(main)
