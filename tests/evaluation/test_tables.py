"""What the tables print of numbers that are not known or differ between layers."""

from alibi_jax.evaluation.tables import evaluation_table


def table_of(protocols, **verdict):
    return evaluation_table(
        {
            "protocols": protocols,
            "train_length": 64,
            "lengths": [64],
            "training_overlap": {"ngram": 13, "share": 0.25, "num_searched": 1000},
            "num_copies": 2,
            "left_out": ["evaluation lengths left out: 128 (too long)"],
            "num_targets": 8,
            "num_windows": 3,
            "num_documents": 3,
            "unit": "document",
            "unknown_bytes": 0.0,
            "word_level": False,
            "verdict": {"text": "Nothing.", "warning": None, **verdict},
        }
    )


def test_keys_are_medians_over_the_layers_where_they_are_known():
    layers = {
        0: [(None, [1, 2]), ([1, 4.0], [3, 8]), ([2, 9.0], None)],
        1: [(None, None)] * 3,
    }
    heads = [
        {"layer": layer, "head": head, "keys": keys or [None, None], "slope_keys": slope_keys}
        for head, of_layers in layers.items()
        for layer, (keys, slope_keys) in enumerate(of_layers)
    ]
    mass = {"quantiles": [0.5, 0.9], "length": 64, "heads": heads}
    rows = table_of({"attention_mass": mass}).splitlines()
    # Of 4 and 9, and of 2 and 8: halfway.
    assert rows[1].split() == ["measured", "6", "-"]
    assert rows[2].split() == ["bias", "alone", "5", "-"]


def test_the_text_is_named_with_its_copies_and_what_training_has_of_it():
    text = " ".join(table_of({}).split())
    assert (
        "3 windows of 64 tokens from 3 documents (2 documents left out as copies of others); 25.0% "
        "of the tokens are in 13-grams of the training text. Intervals are wide, of only 3 "
        "documents. 25% of the tokens stand in the training text as well: losses of new text would "
        "be higher. evaluation lengths left out: 128 (too long)."
    ) in text
