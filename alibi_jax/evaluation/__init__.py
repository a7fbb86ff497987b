"""Evaluation beyond the training length: losses, intervals, a verdict, a table and a figure.

`longest_windows` -> `evaluate` -> `summarize` -> `table`, `write_json`, `extrapolation_figure`.
"""

from alibi_jax.evaluation.config import EvaluationConfig
from alibi_jax.evaluation.figure import extrapolation_figure
from alibi_jax.evaluation.protocols import (
    Windows,
    bytes_per_token,
    evaluate,
    longest_windows,
    supported_lengths,
    token_losses,
)
from alibi_jax.evaluation.report import summarize, table, versions, write_json

__all__ = [
    "EvaluationConfig",
    "Windows",
    "bytes_per_token",
    "evaluate",
    "extrapolation_figure",
    "longest_windows",
    "summarize",
    "supported_lengths",
    "table",
    "token_losses",
    "versions",
    "write_json",
]
