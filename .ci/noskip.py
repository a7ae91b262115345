"""A pytest plugin for where everything is installed: a test is skipped there only if it does what is forbidden."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turns a success with skipped tests into a failure, but for those that containers may forbid."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    reasons = [str(report.longrepr) for report in (reporter.stats.get("skipped", []) if reporter else [])]
    if reporter and any("not allowed here" not in reason for reason in reasons) \
            and session.exitstatus == pytest.ExitCode.OK:
        reporter.write_line("\nfailed: tests were skipped where none may be", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
