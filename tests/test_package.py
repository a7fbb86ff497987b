"""What a user meets first: the import, the README's code, the shipped examples of commands."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp

import alibi_jax

ROOT = Path(__file__).parents[1]
HEAVY = ("tensorflow_datasets", "tensorflow", "matplotlib", "orbax.checkpoint", "grain")


def test_import_is_light():
    code = f"import sys, alibi_jax; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_public_names():
    for name in alibi_jax.__all__:
        assert callable(getattr(alibi_jax, name))
        assert getattr(alibi_jax, name).__doc__


def test_examples_in_docstrings_run():
    """Each by itself, so that whoever copies one has all of it."""
    examples = {}
    for name in alibi_jax.__all__:
        for test in doctest.DocTestFinder().find(getattr(alibi_jax, name), name, globs={}):
            assert doctest.DocTestRunner().run(test).failed == 0, test.name
            examples[test.name] = len(test.examples)
    for name in ("DistanceBias", "LinearBias", "PrefixBias", "prefix_sums"):
        assert examples[name] > 1


def test_code_in_the_readme_runs():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert names["slopes"].shape == (8,)
    assert names["bias"].shape == (8, 4, 4)
    assert names["output"].shape == names["query"].shape
    assert names["logits"].shape == (1, 4096, 257)
    assert jnp.allclose(names["next_logits"], names["logits"][:, -1:], atol=1e-4)


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) >= 8
    for link in links:
        assert (ROOT / link).exists(), link
