"""What is evaluated beyond the training length, and whether that can work."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alibi_jax import fields
from alibi_jax.errors import require

_MOST = 1_000_000  # windows, trials and resamples: with more it would not end
_MIN_BOOTSTRAP = 100  # below this the 2.5th percentile is one or two resamples


@dataclass(frozen=True)
class EvaluationConfig:
    """How a trained model is evaluated beyond its training length."""

    # Window lengths as multiples of the training length, from 1 on; each is a multiple of the one
    # before it, so that windows of every length tile the same tokens.
    multiples: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    # Held-out split that is scored: "valid" or "test".
    split: Literal["valid", "test"] = "test"
    # Windows of the longest length, spread over as many documents as possible. More of them
    # narrow the intervals; time grows in proportion.
    num_windows: int = 32
    # Tokens at the end of every longest window that the fixed-target protocol scores; at most half
    # the training length, so that each has the other half before it at every length.
    num_targets: int = 64
    # Sliding windows that overlap at each token: they move by a window's length / overlap, so every
    # target has at least 1 - 1/overlap of it as context, at overlap times the cost.
    overlap: int = 4
    # Trials of each retrieval task at each length (and depth).
    num_trials: int = 16
    # Tokens computed at once, which bounds memory: in training at least the longest length, while
    # `alibi eval` and `alibi compare` go through longer windows in chunks of so many.
    tokens_per_batch: int = 16384
    # Bootstrap resamples of the documents behind each interval.
    num_bootstrap: int = 1000

    def lengths(self, train_length: int) -> tuple[int, ...]:
        """Window lengths in tokens, shortest first."""
        return tuple(multiple * train_length for multiple in self.multiples)

    def validate(self, train_length: int, *, whole_windows: bool = True) -> None:
        """Raise UserError, before anything is trained, for an evaluation that cannot work.

        Args:
            train_length: Tokens per training window.
            whole_windows: Whether windows are computed whole, as at the end of training, and not in
                chunks, as by `alibi eval` and `alibi compare`.
        """
        fields.check(self, "config.evaluation")
        self.validate_multiples()
        self.validate_counts(train_length)
        longest = self.lengths(train_length)[-1]
        require(
            self.tokens_per_batch >= longest or not whole_windows,
            f"config.evaluation.tokens_per_batch={self.tokens_per_batch} is less than one window "
            f"of {longest} tokens: raise it, or shorten config.evaluation.multiples",
        )

    def validate_multiples(self) -> None:
        """Raise UserError for multiples that no evaluation can have."""
        require(
            self.multiples[:1] == (1,),
            f"config.evaluation.multiples={self.multiples}: must start with 1, the training "
            "length, with which the others are compared",
        )
        check_chain("config.evaluation.multiples", self.multiples)

    def validate_counts(self, train_length: int) -> None:
        """Raise UserError for a number that no evaluation can have."""
        require(
            train_length >= 2,
            f"config.data.sequence_length={train_length}: an evaluation needs at least 2, half of "
            "them as context of the targets",
        )
        for name in ("num_windows", "num_trials"):
            value = getattr(self, name)
            require(
                1 <= value <= _MOST,
                f"config.evaluation.{name}={value}: must be at least 1 and at most {_MOST}",
            )
        require(
            2 <= self.overlap <= train_length,
            f"config.evaluation.overlap={self.overlap}: must be at least 2, or windows would not "
            f"overlap, and at most the training length, {train_length}",
        )
        require(
            1 <= self.num_targets <= train_length // 2,
            f"config.evaluation.num_targets={self.num_targets}: must be at least 1 and at most "
            f"{train_length // 2}, half the training length, which leaves the targets context",
        )
        require(
            train_length <= self.tokens_per_batch < 2**31,
            f"config.evaluation.tokens_per_batch={self.tokens_per_batch}: must be at least the "
            f"training length, {train_length}, and at most {2**31 - 1}",
        )
        require(
            _MIN_BOOTSTRAP <= self.num_bootstrap <= _MOST,
            f"config.evaluation.num_bootstrap={self.num_bootstrap}: must be at least "
            f"{_MIN_BOOTSTRAP} for a 95% interval, and at most {_MOST}",
        )


def check_chain(name: str, values: Sequence[int]) -> None:
    """Raise UserError unless each value is a larger multiple of the one before it."""
    for shorter, longer in itertools.pairwise(values):
        require(
            longer > shorter and longer % shorter == 0,
            f"{name} has {longer} after {shorter}: each must be a larger multiple of the one "
            f"before it, for example {2 * shorter}",
        )
