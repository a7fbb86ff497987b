"""The notebooks run from top to bottom in a fresh kernel, and are published as they ran.

After a change to one: `jupyter execute --inplace notebooks/NAME.ipynb` makes its outputs anew.
"""

import pathlib
import re

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs .[notebooks]")
nbclient = pytest.importorskip("nbclient", reason="needs .[notebooks]")
pytest.importorskip("ipykernel", reason="needs .[notebooks]")

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 700_000  # bytes; pictures are kept small, for a repository that is quick to clone


def by_name(path):
    return path.stem


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # neither history nor profile of this user
    monkeypatch.delenv("XLA_FLAGS")  # the tests' own are without optimisation, and slow
    before = set(path.parent.iterdir())
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=folder).execute()
    assert set(path.parent.iterdir()) == before  # leaves no file behind
    pictures = [
        output
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_is_published_as_it_ran(path):
    """Readers on the web see outputs: of one whole run and of nobody's machine, or none."""
    assert path.stat().st_size < LARGEST
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    cells = code_cells(notebook)
    outputs = [output for cell in cells for output in cell.outputs]
    if outputs:
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    assert not re.findall(r'[ "\'](?:/home|/root|/tmp|/Users|/work)/\S*', text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_installs_first(path):
    first = code_cells(nbformat.read(path, as_version=4))[0]
    assert "%pip install" in first.source
    assert re.search(r"^import alibi_jax|^from alibi_jax", first.source, re.M) is None
