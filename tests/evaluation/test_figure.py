"""The figure is drawn for every kind of result, and only then is Matplotlib imported."""

import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from alibi_jax.evaluation import Windows, extrapolation_figure, panels
from alibi_jax.evaluation.assess import PROTOCOLS
from alibi_jax.evaluation.panels import evaluation_figure
from tests.evaluation.oracles import explodes, scorer, uses
from tests.evaluation.report_files import summarized
from tests.evaluation.test_assess import evaluate


def summary_of(losses, num_documents=4):
    rng = np.random.default_rng(0)
    level = rng.gamma(3, size=(8, 64)).astype(np.float32)
    tokens = np.zeros((8, 65), np.int32)
    windows = Windows(tokens, np.arange(8) % num_documents, "document", np.ones_like(tokens))
    changed = {length: level + change for length, change in losses.items()}
    return summarized(changed, windows, level + 1.0)


@pytest.mark.parametrize(
    ("losses", "num_documents"),
    [
        ({16: 0, 32: -0.001, 64: 0.001}, 4),  # flat
        ({16: 0, 32: 3, 64: 900}, 4),  # explodes
        ({16: 0, 32: np.inf, 64: np.nan}, 4),
        ({16: np.nan, 32: np.nan}, 4),
        ({16: 0}, 4),  # the training length alone
        ({16: 0, 32: 0.1}, 1),  # no intervals
    ],
)
def test_every_kind_of_result_can_be_drawn(tmp_path, losses, num_documents):
    path = tmp_path / "extrapolation.png"
    extrapolation_figure(summary_of(losses, num_documents), path, title="a title")
    image = matplotlib.image.imread(path)
    assert image.shape[:2] == (520, 1380)
    assert image[..., :3].std() > 0.05  # something is drawn


def test_importing_evaluation_leaves_matplotlib_alone():
    code = "import sys, alibi_jax.evaluation; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("losses", "wanted", "shape"),
    [
        (uses(64), PROTOCOLS, (920, 1380)),
        (explodes(64), ("nonoverlapping", "truncation"), (460, 1380)),
        (uses(64), ("needle",), (460, 460)),
    ],
)
def test_the_evaluation_figure_has_a_panel_for_all_that_was_measured(
    tmp_path, losses, wanted, shape
):
    path = tmp_path / "evaluation.png"
    evaluation_figure(evaluate(scorer(losses), wanted=wanted), path, title="a title")
    image = matplotlib.image.imread(path)
    assert image.shape[:2] == shape
    assert image[..., :3].std() > 0.05


def test_heads_count_from_0_as_in_the_numbers_and_the_report():
    heads = [
        {"layer": 0, "head": head, "keys": [1.0, 2.0, 4.0], "slope_keys": [1, 2, 4]}
        for head in range(4)
    ]
    mass = {"quantiles": [0.5, 0.9, 0.99], "length": 64, "heads": heads}
    axes = Figure().subplots()
    panels._mass(axes, {"protocols": {"attention_mass": mass}})
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "3"]
    assert axes.collections[0].get_offsets()[:, 0].tolist() == [0, 1, 2, 3]
    assert axes.lines[0].get_xdata().tolist() == [0, 1, 2, 3]
