"""Every notebook is paired with its text, has no outputs, and runs from top to bottom."""

from pathlib import Path

import jupytext
import nbclient
import pytest

ROOT = Path(__file__).parent.parent
TEXTS = sorted((ROOT / "notebooks").glob("*.py"))


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_notebooks():
    assert TEXTS
    paired = {path.with_suffix(".py") for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert paired == set(TEXTS)


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_pair_is_in_step_and_has_no_outputs(text):
    notebook = jupytext.read(text.with_suffix(".ipynb"))
    assert cells(jupytext.read(text)) == cells(notebook), (
        f"run jupytext --to ipynb --update notebooks/{text.name}"
    )
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_it_runs(text):
    notebook = jupytext.read(text)
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert pictures
