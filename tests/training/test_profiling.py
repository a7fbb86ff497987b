"""Which steps are traced, and what is said of those that cannot be."""

import pytest

from alibi_jax.errors import UserError
from alibi_jax.training import profiling


def test_steps():
    assert profiling.parse_steps("0:1", 10) == range(1)
    assert profiling.parse_steps("7:10", 10) == range(7, 10)


@pytest.mark.parametrize(
    "text", ["", ":", "5", "5:", ":5", "5:5", "6:5", "-1:5", "5:11", "1:2:3", "a:b", "1.0:2", "²:3"]
)
def test_bad_steps(text):
    with pytest.raises(UserError, match=r"^--profile=.*: must be START:STOP, .* <= 10, which is"):
        profiling.parse_steps(text, 10)
