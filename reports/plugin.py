"""The pytest hook that renders an audit once its rows are written."""

import pytest

from .render import render


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = session.config.option.report
    is_worker = hasattr(session.config, "workerinput")
    if folder is not None and not is_worker and (folder / "rows.jsonl").is_file():
        render([folder / "rows.jsonl"], folder)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.option.report is not None and (config.option.report / "rows.jsonl").is_file():
        terminalreporter.write_line(
            f"streamgauge: the page is {config.option.report / 'report.html'}"
        )
