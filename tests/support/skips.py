"""A skip that `allowed_skips.py` does not list is a failure, and so is every xfail; the others are
counted at the end.

A module that skips itself while it is collected may do so where ``-m`` leaves its tests out anyway.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Generator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark.expression import Expression

from tests.support.allowed_skips import ALLOWED, Allowed


def allowed(test: str, reason: str, entries: Sequence[Allowed] = ALLOWED) -> bool:
    """Whether an entry that holds on this machine names the test and the reason."""
    return any(
        entry.here and fnmatchcase(test, entry.tests) and re.fullmatch(entry.reason, reason)
        for entry in entries
    )


def module_marks(path: Path) -> set[str]:
    """Names of the marks in a module's ``pytestmark``, which a module that skips itself does not
    get to tell."""
    statements = ast.parse(path.read_text()).body
    values = [
        s.value
        for s in statements
        if isinstance(s, ast.Assign) and "pytestmark" in map(ast.unparse, s.targets)
    ]
    return {
        node.attr for value in values for node in ast.walk(value) if isinstance(node, ast.Attribute)
    }


def reason_of(report: Any) -> str:
    """What the test said; an xfail, expected or not, with its word before."""
    if hasattr(report, "wasxfail"):
        return f"xfail: {report.wasxfail}"
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return said.removeprefix("Skipped: ")


def judge(report: Any, entries: Sequence[Allowed] = ALLOWED) -> Any:
    """The report, failed where it is a skip that is not allowed."""
    if (report.skipped or hasattr(report, "wasxfail")) and not allowed(
        report.nodeid, reason_of(report), entries
    ):
        reason = reason_of(report)
        report.outcome = "failed"
        report.longrepr = (
            f"{report.nodeid}: skipped, and tests/support/allowed_skips.py does not allow it "
            f"here: {reason}"
        )
        vars(report).pop("wasxfail", None)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    return judge((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    if report.skipped and (chosen := collector.config.option.markexpr):
        marks = module_marks(collector.path)
        if not Expression.compile(chosen).evaluate(lambda name, **_: name in marks):
            return report
    return judge(report)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many tests did not run, by reason."""
    reports = terminalreporter.stats.get("skipped", [])
    for reason, count in sorted(Counter(map(reason_of, reports)).items()):
        terminalreporter.write_line(f"{count} skipped: {reason}")
