"""The report: finished runs read into a small model, and written as one self-contained HTML page."""

from coldtap.adaptors.report.model import Report, RunReport, StoreReport
from coldtap.adaptors.report.page import Thumbnails, render_page, wanted_images
from coldtap.adaptors.report.reading import read_report

__all__ = ["Report", "RunReport", "StoreReport", "Thumbnails", "read_report", "render_page", "wanted_images"]
