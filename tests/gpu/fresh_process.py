"""Hooks for pytest: no test runs in a process whose GPU an earlier one may have broken.

After some errors (an illegal address, a launch that timed out) every later call of CUDA in the process fails too. So a
worker of pytest-xdist ends after a test on the GPU that raised anything but a failed assertion, and xdist goes on in a
new one, with a line "worker crashed" more for that test; as it does where a test ends the process itself.
"""

from __future__ import annotations

import os

import pytest

_BROKEN = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed and item.get_closest_marker("gpu") and not call.excinfo.errisinstance(AssertionError):
        item.session.stash[_BROKEN] = True
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item):
    result = yield
    if item.session.stash.get(_BROKEN, False) and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
    return result
