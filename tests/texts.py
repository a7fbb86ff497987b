"""Texts for tests that train: words of a few letters, at random."""

import random
from collections.abc import Sequence
from pathlib import Path


def draw_words(rng: random.Random, count: int = 300) -> list[str]:
    """A language's words."""
    return ["".join(rng.choices("abcdefgh", k=rng.randint(2, 8))) for _ in range(count)]


def write_texts(
    folder: Path, rng: random.Random, words: Sequence[str], *, count: int = 40, length: int = 450
) -> None:
    """Makes the folder if need be, and in it `count` files of `length` words each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.txt").write_text(" ".join(rng.choices(words, k=length)))
