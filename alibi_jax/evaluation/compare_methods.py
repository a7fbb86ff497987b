"""The methods of a comparison: METHOD[+FIELD[=VALUE]...], each a variant of one config."""

import dataclasses
import re
from typing import NamedTuple

from alibi_jax.config import Config, load_config
from alibi_jax.errors import UserError, require

_WRITTEN = "METHOD or METHOD+FIELD=VALUE, with commas between, such as alibi,rotary,alibi+sink"
_NAME = re.compile(r"[\w.=+-]+")  # also the name of a directory
_OWN_FIELDS = {
    "model.position": "--methods names the position methods",
    "training.seed": "--seeds=N takes the N seeds from config.training.seed of the file on",
}


# How positions are scaled at inference, as in `DecoderConfig`: nothing that is trained.
_AT_INFERENCE = ("length_scaling", "scaling_factor")


class Method(NamedTuple):
    """A name as a person writes it, and what it stands for."""

    name: str
    config: Config  # as it is evaluated
    trained_as: str  # the name without what is of inference alone; also that of its directory


def parse_methods(text: str, path: str, overrides: dict[str, str]) -> list[Method]:
    """The methods that `--methods=text` names, as variants of the config at `path`.

    `alibi+sink` sets config.model.position=alibi and config.model.sink=true;
    `alibi+alibi_heads=4+sink` sets a third field.

    Args:
      text: the value of --methods.
      path: the config file, as for `load_config`.
      overrides: of the command line, for all methods.

    Raises:
      UserError: a method or a field does not exist, a value cannot be, two methods are the same,
        or an override sets what differs between the runs.
    """
    for name, reason in _OWN_FIELDS.items():
        require(name not in overrides, f"--config.{name} cannot be given here: {reason}")
    methods = [_method(word.strip(), path, overrides) for word in text.split(",")]
    for index, method in enumerate(methods):
        for earlier in methods[:index]:
            require(
                method.config != earlier.config,
                f"--methods={text}: {earlier.name} and {method.name} are the same: leave one out",
            )
    return methods


def with_seed(config: Config, seed: int) -> Config:
    """The config of one run of a method."""
    training = dataclasses.replace(config.training, seed=seed)
    return dataclasses.replace(config, training=training)


def trained(config: Config) -> Config:
    """The config that a method is trained with: its positions are scaled at inference only."""
    model = dataclasses.replace(config.model, length_scaling="none", scaling_factor=1.0)
    return dataclasses.replace(config, model=model)


def _method(word: str, path: str, overrides: dict[str, str]) -> Method:
    require(bool(_NAME.fullmatch(word)), f"--methods has {word!r}: write {_WRITTEN}")
    position, *settings = word.split("+")
    fields, parts = {"position": position}, [position]
    for setting in settings:
        field, _, value = setting.partition("=")
        require(bool(field) and field not in fields, f"--methods has {word!r}: write {_WRITTEN}")
        fields[field] = value or "true"
        parts.append(field if fields[field] == "true" else setting)
    changed = {f"model.{field}": value for field, value in fields.items()}
    try:
        config = load_config(path, overrides | changed)
    except UserError as error:
        raise UserError(f"--methods has {word!r}: {error}") from error
    of_training = [part for part in parts if part.partition("=")[0] not in _AT_INFERENCE]
    return Method("+".join(parts), config, "+".join(of_training))
