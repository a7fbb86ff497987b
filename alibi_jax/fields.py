"""Fields of configs: their types and choices, checked and read from text.

A field is annotated as int, float, str, bool, a `Literal` of words, a tuple of numbers, or one of
these or None.
"""

import ast
import dataclasses
import difflib
import math
import types
import typing
from typing import Any, Literal

from alibi_jax.errors import require

# What others call a choice, where its spelling does not tell.
ALIASES = {
    "rope": "rotary",
    "nope": "none",
    "fox": "forgetting",
    "ln": "layernorm",
    "rms": "rmsnorm",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "nesterov": "nag",
    "trapezoidal": "wsd",
    "bf16": "bfloat16",
    "fp32": "float32",
}


def check(node: Any, name: str) -> None:
    """Checks every field of a dataclass, and of those that it holds.

    Args:
      node: the dataclass.
      name: what a person calls it, such as "config.model".

    Raises:
      UserError: a value is not of its field's type or choices.
    """
    annotations = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        value, here = getattr(node, field.name), f"{name}.{field.name}"
        annotation = annotations[field.name]
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            given = type(value).__name__
            require(
                type(value) is annotation, f"{here} is a {given}: must be a {annotation.__name__}"
            )
            check(value, here)
        else:
            _check(_as_float(value, annotation), annotation, f"{here}={value!r}")


def parse(text: str, annotation: Any, name: str) -> Any:
    """The value of a field that `text` spells; UserError if it spells none."""
    if annotation is str or text in _choices(annotation):
        return text
    if str in typing.get_args(annotation) and text.lower() != "none":  # str | None
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None if text.lower() == "none" else text
    if _element(annotation) is not None and isinstance(value, list | int | float):
        value = tuple(value) if isinstance(value, list) else (value,)
    value = _as_float(value, annotation)
    _check(value, annotation, f"--{name}={text}")
    return value


def _as_float(value: Any, annotation: Any) -> Any:
    """Integers are welcome where a float is asked for."""
    element = _element(annotation)
    if element is float and isinstance(value, tuple):
        return tuple(_as_float(item, float) for item in value)
    if type(value) is int and float in (annotation, *typing.get_args(annotation)):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value


def _check(value: Any, annotation: Any, given: str) -> None:
    require(
        _matches(value, annotation),
        f"{given}: must be {_spell(annotation)}{_suggestion(value, annotation)}",
    )


def _suggestion(value: Any, annotation: Any) -> str:
    """The choice that was most likely meant, as the end of a sentence; else nothing."""
    if not isinstance(value, str):
        return ""
    word, choices = value.lower(), _choices(annotation)
    close = difflib.get_close_matches(ALIASES.get(word, word), choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _matches(value: Any, annotation: Any) -> bool:
    if annotation in (int, float, str, bool, type(None)):
        return type(value) is annotation
    if typing.get_origin(annotation) is Literal:
        return isinstance(value, str) and value in typing.get_args(annotation)
    element = _element(annotation)
    if element is not None and isinstance(value, tuple):
        return all(_matches(item, element) for item in value)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return any(_matches(value, option) for option in typing.get_args(annotation))
    return False


def _element(annotation: Any) -> Any:
    """Type of the elements where the annotation is, or may be, a tuple; else None."""
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0]
    elements = [_element(option) for option in typing.get_args(annotation)]
    return next((element for element in elements if element is not None), None)


def _choices(annotation: Any) -> tuple[str, ...]:
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return tuple(choice for option in typing.get_args(annotation) for choice in _choices(option))


def _spell(annotation: Any) -> str:
    plain = {
        int: "an integer",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "none",
    }
    if annotation in plain:
        return plain[annotation]
    if typing.get_origin(annotation) is Literal:
        return "one of " + ", ".join(typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        numbers = {int: "integers", float: "numbers"}[typing.get_args(annotation)[0]]
        return f"{numbers} with commas between"
    return " or ".join(_spell(option) for option in typing.get_args(annotation))
