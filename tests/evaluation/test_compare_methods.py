"""How methods are written on the command line."""

import pytest

from alibi_jax.errors import UserError
from alibi_jax.evaluation.compare_methods import parse_methods, trained, with_seed

FILE = "configs/quickstart.py"


def test_methods_are_variants_of_one_config():
    plain, none, scaled = parse_methods(
        "alibi, none,alibi+slope_scale=2+tie_embeddings=false",
        FILE,
        {"training.num_steps": "7", "model.num_layers": "2"},
    )
    assert [m.name for m in (plain, none, scaled)] == [
        "alibi",
        "none",
        "alibi+slope_scale=2+tie_embeddings=false",
    ]
    assert (plain.config.model.position, none.config.model.position) == ("alibi", "none")
    assert scaled.config.model.slope_scale == 2.0
    assert not scaled.config.model.tie_embeddings
    for method in (plain, none, scaled):
        assert (method.config.training.num_steps, method.config.model.num_layers) == (7, 2)
        assert method.config.data == plain.config.data


def test_a_field_alone_is_true():
    short, long = (parse_methods(f"alibi+{text}", FILE, {})[0] for text in ("sink", "sink=true"))
    assert short == long
    assert short.name == "alibi+sink"
    assert short.config.model.sink


def test_methods_that_differ_in_inference_alone_are_trained_as_one():
    names = "rotary,rotary+length_scaling=yarn+scaling_factor=8,alibi+length_scaling=dynamic+sink"
    plain, yarn, dynamic = parse_methods(names, FILE, {})
    assert [m.trained_as for m in (plain, yarn, dynamic)] == ["rotary", "rotary", "alibi+sink"]
    assert yarn.config.model.length_scaling == "yarn" and yarn.config.model.scaling_factor == 8
    assert trained(yarn.config) == plain.config == trained(plain.config)
    (sink,) = parse_methods("alibi+sink", FILE, {})
    assert trained(dynamic.config) == sink.config


def test_a_seed_changes_nothing_else():
    (method,) = parse_methods("alibi", FILE, {})
    config = with_seed(method.config, 5)
    assert config.training.seed == 5
    assert with_seed(config, method.config.training.seed) == method.config


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("alibi,", {}, "--methods has ''"),
        ("alibi,rotari", {}, "'rotari': --config.model.position=rotari: must be one of alibi"),
        ("alibi+sinc", {}, "did you mean config.model.sink?"),
        ("alibi+slope_scale=steep", {}, "--config.model.slope_scale=steep: must be a number"),
        ("alibi+", {}, "write METHOD or METHOD+FIELD=VALUE"),
        ("alibi+position=none", {}, "write METHOD or METHOD+FIELD=VALUE"),
        ("../alibi", {}, "write METHOD or METHOD+FIELD=VALUE"),
        ("alibi,none,alibi", {}, "alibi and alibi are the same"),
        ("alibi,alibi+slope_scale=1", {}, "alibi and alibi+slope_scale=1 are the same"),
        ("alibi", {"model.position": "none"}, "--config.model.position cannot be given here"),
        ("alibi", {"training.seed": "3"}, "--config.training.seed cannot be given here"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(text, overrides, words):
    with pytest.raises(UserError) as raised:
        parse_methods(text, FILE, overrides)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
