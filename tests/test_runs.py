"The run notebooks under plain papermill, as a user starts them."
import json
import re
import subprocess
import sys

import nbformat
import pytest

from dmp_wb.core import project_root
from dmp_wb.runs import here, listed

RUNS = project_root() / "nbs" / "runs"
SMALL = "model.hidden_size=16 model.num_layers=2 model.num_attention_heads=2 train.batch_size=16 train.log_every=5"


def papermill(notebook, output, *parameters):
    flat = [word for name, value in zip(parameters[::2], parameters[1::2], strict=True) for word in ("-p", name, str(value))]
    return subprocess.run([sys.executable, "-m", "papermill", str(notebook), str(output), *flat], capture_output=True, text=True, cwd=project_root())


def assert_page(page):
    html = page.read_text(encoding="utf-8")
    assert not re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="(?:https?:)?//[^"]+', html)   # opens without a network
    return html


def test_the_chain_of_run_folders(runs_folder):
    done = papermill(RUNS / "pretrain.ipynb", runs_folder / "a" / "pretrain.ipynb", "overrides", f"{SMALL} train.steps=40", "num_samples", 20, "num_inference_steps", 4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"digits-quick  40/40 100%  [\d.]+ step/s  took \d\d:\d\d  loss \d", done.stderr)      # a cell's progress reached the terminal
    assert {p.name for p in (runs_folder / "a").iterdir()} >= {"pretrain.ipynb", "pretrain.html", "config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "model", "figures"}
    figures = [o for c in nbformat.read(runs_folder / "a" / "pretrain.ipynb", 4).cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    html = assert_page(runs_folder / "a" / "pretrain.html")
    assert len(figures) == 2 and all(f.data["image/png"][:200] in html for f in figures)

    done = papermill(RUNS / "patch.ipynb", runs_folder / "b" / "patch.ipynb", "base", runs_folder / "a", "overrides", "train.steps=10 train.batch_size=16", "num_inference_steps", 4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (runs_folder / "b" / "patch" / "adapter_model.safetensors").exists()

    done = papermill(RUNS / "sample.ipynb", runs_folder / "c" / "sample.ipynb", "models", f"base:{runs_folder / 'a'} dmp:{runs_folder / 'b'}", "num_images", 30, "num_inference_steps", 4)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((runs_folder / "c" / "evaluation.json").read_text())["figures"]
    assert set(figures) == {"base", "dmp"} and figures["dmp"]["difference"] == pytest.approx(figures["dmp"]["frechet"] - figures["base"]["frechet"])
    import numpy as np
    samples = np.load(runs_folder / "c" / "samples" / "dmp.npz")
    assert samples["arr_0"].shape == (30, 8, 8, 1) and samples["arr_0"].dtype == np.uint8

    done = papermill(RUNS / "gates.ipynb", runs_folder / "d" / "gates.ipynb", "model", runs_folder / "b", "timesteps", "0 500 999")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in (runs_folder / "d" / "figures").iterdir()} == {"gates.png", "gate-maps.png", "entropy.png"}
    assert_page(runs_folder / "d" / "gates.html")


@pytest.mark.parametrize("notebook,parameters,message", [
    ("patch", ("experiment", "digits-dpm"), "unknown experiment 'digits-dpm': did you mean 'digits-dmp'"),
    ("gates", ("timesteps", "0 1000"), "timestep 1000 is out of range: expected 0 to 999"),
    ("sample", ("models", "digits-bse"), "did you mean 'digits-base'"),
])
def test_a_failing_notebook_keeps_its_page_and_fails(notebook, parameters, message, tmp_path):
    done = papermill(RUNS / f"{notebook}.ipynb", tmp_path / "x.ipynb", *parameters)
    assert done.returncode != 0 and message in done.stderr
    assert message.split(":")[0] in assert_page(tmp_path / "x.html").replace("&#39;", "'")
    assert not (tmp_path / "summary.json").exists()


def test_other_peoples_notebooks_are_left_alone(tmp_path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import os; print(os.environ.get('DMP_WB_RUN'))")],
                                  metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(nb, tmp_path / "theirs.ipynb")
    done = papermill(tmp_path / "theirs.ipynb", tmp_path / "out.ipynb")
    assert done.returncode == 0, done.stderr
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[0].text == "None\n"
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize("first", ["import dmp_wb.runs", "import papermill"])
def test_engine_is_there_whichever_is_imported_first(first):
    code = f"{first}; from papermill.engines import papermill_engines as e; print(e.get_engine(None).__name__, e.get_engine('dmp-wb').__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["RunEngine", "RunEngine"]


@pytest.mark.parametrize("file", sorted(RUNS.glob("*.ipynb")), ids=lambda f: f.stem)
def test_run_notebooks_say_what_they_do(file):
    nb = nbformat.read(file, 4)
    opening = nb.cells[0].source
    assert nb.cells[0].cell_type == "markdown" and opening.startswith("# ") and "| parameter | meaning |" in opening
    cells = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    for name in re.findall(r"^(\w+) =", cells[0].source, re.M): assert f"`{name}`" in opening, name
    assert nb.cells[-1].source.startswith("**Look at**") and nb.metadata.dmp_wb.page


def test_parameters_and_folders(tmp_path, monkeypatch, runs_folder):
    assert listed("a=1 b=2") == ["a=1", "b=2"] and listed(["a", 1]) == ["a", "1"] and listed("") == listed(None) == []
    assert here("", "name") == runs_folder / "name" and here("x/y", "name") == runs_folder / "x/y" and here(str(tmp_path / "z"), "") == tmp_path / "z"
    monkeypatch.setenv("DMP_WB_RUN", str(tmp_path / "papermill"))
    assert here("", "name") == tmp_path / "papermill"
