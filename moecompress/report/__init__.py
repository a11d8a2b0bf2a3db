"""What a run did, for people: report.json, report.md, report.html and the model card."""

from moecompress.report.build import read_evaluation, read_report, write_report, write_report_json
from moecompress.report.card import model_card
from moecompress.report.schema import Evaluation, Report

__all__ = [
    "Evaluation",
    "Report",
    "model_card",
    "read_evaluation",
    "read_report",
    "write_report",
    "write_report_json",
]
