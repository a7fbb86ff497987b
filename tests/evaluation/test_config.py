"""A wrong evaluation is refused before anything is trained."""

import pytest

from alibi_jax.errors import UserError
from alibi_jax.evaluation import EvaluationConfig


def test_defaults_are_valid_at_128_tokens():
    EvaluationConfig().validate(128)
    EvaluationConfig(num_targets=64).validate(129)
    assert EvaluationConfig().lengths(128) == (128, 256, 512, 1024, 2048, 4096)


def test_a_training_length_without_context_is_refused():
    with pytest.raises(UserError, match="sequence_length=1: an evaluation needs at least 2"):
        EvaluationConfig(multiples=(1,), num_targets=1, overlap=2).validate(1)
    EvaluationConfig(multiples=(1,), num_targets=1, overlap=2).validate(2)


def test_windows_in_chunks_may_be_longer_than_what_is_computed_at_once():
    EvaluationConfig(tokens_per_batch=128).validate(128, whole_windows=False)
    with pytest.raises(UserError, match="training length, 128"):
        EvaluationConfig(tokens_per_batch=127).validate(128, whole_windows=False)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"multiples": ()}, "must start with 1"),
        ({"multiples": (2, 4)}, "must start with 1"),
        ({"multiples": (0, 1)}, "must start with 1"),
        ({"multiples": (1, 1)}, "1 after 1"),
        ({"multiples": (1, 4, 2)}, "2 after 4"),
        ({"multiples": (1, 2, 5)}, "5 after 2"),
        ({"multiples": (1, -2)}, "-2 after 1"),
        ({"num_windows": 0}, "num_windows=0"),
        ({"num_targets": 0}, "num_targets=0"),
        ({"num_targets": 65}, "at most 64, half the training length"),
        ({"tokens_per_batch": 4095}, "one window of 4096"),
        ({"num_bootstrap": 99}, "at least 100"),
        ({"num_trials": 0}, "num_trials=0"),
        ({"overlap": 1}, "overlap=1: must be at least 2"),
        # What would take for ever, or more memory than there is.
        ({"overlap": 129}, "and at most the training length, 128"),
        ({"num_windows": 10**30}, "at least 1 and at most 1000000"),
        ({"num_trials": 2**31}, "at least 1 and at most 1000000"),
        ({"num_bootstrap": 10**9}, "and at most 1000000"),
        ({"tokens_per_batch": 2**31}, "and at most 2147483647"),
        ({"multiples": (1,), "tokens_per_batch": 127}, "at least the training length, 128"),
    ],
)
def test_bad_configs_say_what_to_change(fields, words):
    with pytest.raises(UserError, match=words) as error:
        EvaluationConfig(**fields).validate(128)
    assert "\n" not in str(error.value)
