import pathlib
import re

import jax
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
MOST_BYTES = 600_000
OF_A_MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|opt|usr|var|work|Users)/|ipykernel_\d|[A-Z]:\\\\Users")


def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in notebook(path).cells if cell.cell_type == "code"]


def test_there_is_a_notebook():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_start_to_end_in_a_fresh_kernel(path, tmp_path, monkeypatch):
    # The kernel shares the compiled programs that the tests keep, and nothing of a user's own settings.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    client = NotebookClient(notebook(path), timeout=300, resources={"metadata": {"path": path.parent}})
    # Raises CellExecutionError with the cell and its traceback.
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_was_run_once_in_order_without_errors(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert not any(output.get("name") == "stderr" for cell in cells for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_is_small_and_tells_nothing_of_the_machine_it_ran_on(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    assert not OF_A_MACHINE.search(re.sub(r'"image/png": "[^"]*"', "", text))
    assert notebook(path).metadata.kernelspec.name == "python3"
    assert set(notebook(path).metadata) <= {"kernelspec", "language_info"}
