"""Evaluation beyond the training length: losses, intervals, a verdict, a table and a figure.

`longest_windows` -> `evaluate` -> `summarize` -> `table`, `write_json`, `extrapolation_figure`.
All protocols, and what `alibi eval` does with them, are in `alibi_jax.evaluation.run`.
"""

from alibi_jax.evaluation.config import EvaluationConfig
from alibi_jax.evaluation.figure import extrapolation_figure
from alibi_jax.evaluation.ngrams import ngram_losses
from alibi_jax.evaluation.overlap import training_overlap
from alibi_jax.evaluation.protocols import evaluate, token_losses
from alibi_jax.evaluation.report import summarize, versions, write_json
from alibi_jax.evaluation.tables import table
from alibi_jax.evaluation.windows import (
    Windows,
    longest_windows,
    supported_lengths,
)

__all__ = [
    "EvaluationConfig",
    "Windows",
    "evaluate",
    "extrapolation_figure",
    "longest_windows",
    "ngram_losses",
    "summarize",
    "supported_lengths",
    "table",
    "token_losses",
    "training_overlap",
    "versions",
    "write_json",
]
