"""The notebooks run, with fewer updates, and readers find in them what comes out: tables, pictures, no errors."""

import re
from pathlib import Path

import pytest

pytest.importorskip("ipykernel", reason="notebooks need ipykernel: pip install ipykernel nbclient")
nbclient = pytest.importorskip("nbclient", reason="notebooks are run by nbclient: pip install ipykernel nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[2]
SHORTER = {"digits_shrink": ("EPOCHS = 20", "EPOCHS = 2"), "transformer_adamw": ("UPDATES = 300", "UPDATES = 30")}


def outputs_of(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return outputs, {kind for output in outputs for kind in output.get("data", ())}


def test_all_notebooks_are_tested():
    assert {path.stem for path in (ROOT / "examples").glob("*.ipynb")} == set(SHORTER)


@pytest.mark.parametrize("name", SHORTER)
def test_notebook_runs(name, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    full, shorter = SHORTER[name]
    assert full in first.source
    first.source = first.source.replace(full, shorter)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    _, kinds = outputs_of(notebook)
    assert {"image/png", "text/html"} <= kinds
    stored, stored_kinds = outputs_of(nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4))
    assert stored_kinds == kinds
    assert [output for output in stored if output.output_type == "error" or output.get("name") == "stderr"] == []


def test_a_comparison_in_a_notebook_shows_a_bar_and_tables(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    recipe, call = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "compare.md").read_text("utf-8"), re.DOTALL)
    call = call.replace('"updates": 300', '"updates": 20, "seeds": 1, "cycles": 1').replace(
        'report.draw("mine.png")', ""
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in (recipe, call)])
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    bar, *lines, tables = notebook.cells[1].outputs
    assert '<progress value="60" max="60">' in bar["data"]["text/html"]
    assert {line["name"] for line in lines} == {"stdout"}
    assert tables["data"]["text/markdown"].startswith("| sparsity | method")
