"""The report of a run: one HTML page that needs nothing but itself."""

from resvit_export.report.data import ChangedImage, ReportData
from resvit_export.report.page import html_from_run, write_report

__all__ = ["ChangedImage", "ReportData", "html_from_run", "write_report"]
