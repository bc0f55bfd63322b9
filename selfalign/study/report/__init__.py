"""The report of a study: one HTML file that stands alone, and its numbers as JSON."""

from selfalign.study.report.page import write_report

__all__ = ["write_report"]
