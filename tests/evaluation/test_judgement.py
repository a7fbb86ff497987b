"""The three lengths of the verdict, from losses whose answer is known."""

import numpy as np
import pytest

from alibi_jax.evaluation.judgement import MEASURED_BY, conclude, held_to, used_to, warning
from alibi_jax.evaluation.retrieval import retrieves_to

LENGTHS = (64, 128, 256, 512)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2, 2, 2, 2], 512),
        ([2, 2.019, 2.019, 2.03], 256),
        ([2, 2.03, 2, 2], 64),  # a length beyond one that fails does not count
        ([2, 1.5, np.inf, 1.5], 128),
        ([2, np.nan, 2, 2], 64),
        ([np.nan, 2, 2, 2], 64),
    ],
)
def test_held_to(losses, expected):
    assert held_to(np.array([losses], float), LENGTHS) == [expected]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([2.5, 2.2, 2.0, 2.0], 256),
        ([2.02, 2.009, 2.0, 2.0], 128),  # 0.45% above the lowest
        ([2.0, 2.0, 2.0, 2.0], 64),
        ([2.5, 2.0, 2.4, 3.0], 128),  # longer windows are worse
        ([2.0, 2.5, 2.5, 1.9], 512),  # a later gain is a use
        ([np.inf, np.inf, 3.0, 3.0], 256),
        ([2.5, 2.0, np.nan, np.inf], 128),
    ],
)
def test_used_to(losses, expected):
    assert used_to(np.array([losses], float), LENGTHS) == [expected]


def cells(*rows):
    """Intervals [low, high] of two depths at 64, 128, ... tokens, chance 10% and margin 20%."""
    entries = [
        {"length": 64 << i, "depth": depth, "interval": list(interval)}
        for i, row in enumerate(rows)
        for depth, interval in enumerate(row)
    ]
    return {"chance": 0.1, "margin": 0.2, "entries": entries}


FOUND, LOST, UNSURE = (0.6, 1.0), (0.03, 0.2), (0.2, 0.5)


@pytest.mark.parametrize(
    ("rows", "low", "high"),
    [
        ([(FOUND, FOUND), (FOUND, FOUND)], 128, 128),
        ([(FOUND, FOUND), (FOUND, LOST)], 64, 64),  # one depth is lost
        ([(LOST, FOUND), (FOUND, FOUND)], 0, 0),
        ([(FOUND, FOUND), (UNSURE, FOUND), (FOUND, LOST)], 64, 128),
    ],
)
def test_retrieves_to(rows, low, high):
    task = cells(*rows)
    assert (retrieves_to(task, 0), retrieves_to(task, 1)) == (low, high)


def entry(length, change, interval):
    return {
        "length": length,
        "nats_per_token": 2 + change,
        "change": change,
        "change_interval": interval,
        "relative_change": change / 2,
        "relative_change_interval": interval and [bound / 2 for bound in interval],
    }


@pytest.mark.parametrize(
    ("fixed", "whole", "warned"),
    [
        ((0.001, [-0.002, 0.004]), (-0.04, [-0.05, -0.03]), True),
        ((-0.01, [-0.015, -0.005]), (-0.04, [-0.05, -0.03]), True),  # a third of it at most
        ((-0.03, [-0.04, -0.02]), (-0.04, [-0.05, -0.03]), False),
        ((0.001, [-0.002, 0.004]), (-0.01, [-0.03, 0.01]), False),  # does not fall for sure
        ((0.1, [0.05, 0.15]), (0.04, [0.03, 0.05]), False),
        ((0.001, None), (-0.04, None), False),
    ],
)
def test_warning(fixed, whole, warned):
    rows = [[entry(128, 0, [0, 0]), entry(256, *change)] for change in (whole, fixed)]
    text = warning(*rows)
    assert (text is not None) == warned
    if warned:
        assert (
            "at 256 tokens their loss changes by -2.00% [-2.50%, -1.50%], but on the same" in text
        )
    assert warning(*(row[:1] for row in rows)) is None


MISLEADING = ((0.001, [-0.002, 0.004]), (-0.04, [-0.05, -0.03]))
FAIR = ((-0.03, [-0.04, -0.02]), (-0.04, [-0.05, -0.03]))
BROKEN = (
    (0.5, [0.4, 0.6]),
    (-0.01, [-0.02, -0.005]),
)  # it does not hold, and still the curve falls


@pytest.mark.parametrize(
    ("by_length", "named"),
    [
        ((MISLEADING, MISLEADING, MISLEADING), 1024),
        ((MISLEADING, FAIR, FAIR), 256),
        ((FAIR, MISLEADING, FAIR), 512),
        ((FAIR, FAIR, BROKEN), 1024),
        ((FAIR, FAIR, FAIR), None),
    ],
)
def test_the_longest_length_that_misleads_is_named(by_length, named):
    fixed, whole = (
        [entry(128, 0, [0, 0])]
        + [entry(256 << i, *change[which]) for i, change in enumerate(by_length)]
        for which in (0, 1)
    )
    text = warning(whole, fixed)
    assert (text is None) == (named is None)
    assert named is None or f"at {named} tokens" in text


def test_what_was_not_measured_is_none():
    verdict = conclude({}, 512)
    assert verdict["text"] == "Nothing was measured that a verdict needs."
    for name, protocol in MEASURED_BY.items():
        assert verdict[name] is None and verdict[f"{name}_interval"] is None
        assert verdict[f"{name}_protocol"] == protocol
