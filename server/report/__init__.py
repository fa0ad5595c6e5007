"""One self-contained HTML page per run, live or finished."""

from fedhead.server.report.page import render, write_report
from fedhead.server.runs.record import RunRecord

__all__ = ["RunRecord", "render", "write_report"]
