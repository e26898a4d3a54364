"""The report room: a run's records drawn and summed up, and runs on the same data compared step by step."""

from pyalpaca.report.command import main, parser
from pyalpaca.report.compare import BAR, Comparison, compare
from pyalpaca.report.runs import Run, read_run

__all__ = ["BAR", "Comparison", "Run", "compare", "main", "parser", "read_run"]
