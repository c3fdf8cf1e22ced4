"The run notebooks under plain papermill, as a user starts them."
import ast
import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
from conftest import run_cells

from dmp_wb.store.checkpoints import newest_checkpoint
from dmp_wb.store.run import Run
from dmp_wb.config import load_experiment
from dmp_wb.core.errors import BadInput
from dmp_wb.core.paths import project_root
from dmp_wb.methods.patches import get_patch
from dmp_wb.batch.notebook import figures_table, here, listed

RUNS = project_root() / "nbs" / "runs"
SMALL = "model.hidden_size=16 model.num_layers=2 model.num_attention_heads=2 train.batch_size=16 train.log_every=5"


def papermill(notebook, output, *parameters):
    flat = [word for name, value in zip(parameters[::2], parameters[1::2], strict=True)
            for word in ("-p", name, str(value))]
    return subprocess.run([sys.executable, "-m", "papermill", str(notebook), str(output), *flat], capture_output=True,
                          text=True, cwd=project_root())


def test_ctrl_c_under_plain_papermill_leaves_a_checkpoint_and_no_page_of_errors(runs_folder):
    output = runs_folder / "a" / "pretrain.ipynb"
    given = ["-p", "overrides", f"{SMALL} train.steps=100000 train.checkpoint_every=100000 train.log_with=null"]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(RUNS / "pretrain.ipynb"), str(output),
               *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=project_root(),
                          start_new_session=True) as process:
        while not (output.parent / "metrics.jsonl").exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)      # as a terminal sends it
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "Ctrl-C again stops at once" in said and len(said.splitlines()) < 15, said
    assert newest_checkpoint(output.parent) is not None and not Run(output.parent).finished
    ran = [c.execution_count is not None for c in nbformat.read(output, 4).cells if c.cell_type == "code"]
    assert ran[0] and not ran[-1]                  # no cell after the one that trains


def assert_page(page):
    html = page.read_text(encoding="utf-8")
    # fetches nothing
    assert not re.findall(
        r"<(?:script|link|iframe|object|embed|video|audio)\b"
        r"""|\b(?:src|srcset|poster|action)\s*=\s*["']?(?!data:|["'])|url\((?!["']?data:)|@import""",
        html)
    assert "Content-Security-Policy" in html and 'name="viewport"' in html and "prefers-color-scheme: dark" in html
    return html


def test_the_chain_of_run_folders(runs_folder):
    done = papermill(RUNS / "pretrain.ipynb", runs_folder / "a" / "pretrain.ipynb", "overrides",
                     f"{SMALL} train.steps=40", "num_samples", 20, "num_inference_steps", 4)
    assert done.returncode == 0, done.stderr[-3000:]
    # a cell's progress reached the terminal
    assert re.search(r"digits-quick  40/40 100%  [\d.]+ step/s  took \d\d:\d\d  loss \d", done.stderr)
    assert {p.name for p in (runs_folder / "a").iterdir()} >= {"pretrain.ipynb", "pretrain.html", "config.yaml",
                                                               "metrics.jsonl", "summary.json", "checkpoints", "model",
                                                               "figures"}
    figures = [o for c in nbformat.read(runs_folder / "a" / "pretrain.ipynb", 4).cells
               for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    html = assert_page(runs_folder / "a" / "pretrain.html")
    assert len(figures) == 2 and all(f.data["image/png"][:200] in html for f in figures)

    done = papermill(RUNS / "patch.ipynb", runs_folder / "b" / "patch.ipynb", "base", runs_folder / "a", "overrides",
                     "train.steps=10 train.batch_size=16", "num_inference_steps", 4)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (runs_folder / "b" / "patch" / "adapter_model.safetensors").exists()

    found = run_cells("sample", models=f"base:{runs_folder / 'a'} dmp:{runs_folder / 'b'}", run="c", num_images=80,
                      num_inference_steps=4)
    assert found["columns"] == 20
    figures = json.loads((runs_folder / "c" / "evaluation.json").read_text())["figures"]
    assert set(figures) == {"base", "dmp"} and figures["dmp"]["difference"] == pytest.approx(
        figures["dmp"]["frechet"] - figures["base"]["frechet"])
    samples = np.load(runs_folder / "c" / "samples" / "dmp.npz")
    assert (samples["arr_0"].shape == (80, 8, 8, 1) and samples["arr_0"].dtype == np.uint8
            and samples["labels"][:12].tolist() == [*range(10), 0, 1])

    done = papermill(RUNS / "gates.ipynb", runs_folder / "d" / "gates.ipynb", "model", runs_folder / "b", "timesteps",
                     "0 500 999")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.name for p in (runs_folder / "d" / "figures").iterdir()} == {"gates.png", "gate-maps.png", "entropy.png",
                                                                           "similarity.png"}
    assert_page(runs_folder / "d" / "gates.html")

    found = run_cells("evaluate", models=f"{runs_folder / 'a'} real:{runs_folder / 'c' / 'samples' / 'base.npz'}",
                      run="e", num_images=80, scales="1 2", num_inference_steps=4, rounds=10, reference="digits")
    assert (set(found["rows"]) == {"a", "real"} and [r["guidance_scale"] for r in found["rows"]["a"]] == [1, 2]
            and found["rows"]["real"][0]["intervals"])
    assert (len(json.loads((runs_folder / "a" / "summary.json").read_text())["evaluations"]) == 2
            and (runs_folder / "e" / "figures" / "guidance.png").exists())
    found = run_cells("affinity", model=runs_folder / "b", run="f", groups=4, num_images=16, k=2)
    assert (found["affinity"].shape == (4, 4)
            and set(found["panels"]) == {"affinity of gradients", "similarity of gates"}
            and found["weights"] == sum(p.numel() for p in get_patch(found["backbone"]).parameters()))
    assert load_experiment("digits-pretrain",
                           ["multitask.method=uw", f"multitask.clusters={runs_folder / 'f' / 'affinity.safetensors'}",
                            "multitask.k=2"])


def test_a_routed_run(runs_folder):
    run_cells("route", overrides=f"{SMALL} train.steps=10", run="r", num_samples=10, num_inference_steps=3)
    assert {p.name for p in (runs_folder / "r" / "figures").iterdir()} == {"masks.png", "curve.png", "samples.png"}
    found = run_cells("routing", model=runs_folder / "r", run="s")
    assert list(found["masks"]) == ["β = 0.8, α = 4", "β = 0.8, α = 1",
                                    "β = 0.5, α = 4"] and found["masks"]["β = 0.5, α = 4"].shape == (250, 16)
    assert found["rows"]["channels in use"]["β = 0.5, α = 4"] == "8 of 16"
    with pytest.raises(BadInput, match="is not routed"): run_cells("routing", model="digits-base", run="t")
    with pytest.raises(BadInput, match="expected β:α"): run_cells("routing", others="0.8", run="t")
    with pytest.raises(BadInput, match="routes nothing"): run_cells("route", experiment="digits-quick", run="t")


def test_samples_that_cannot_be_measured_are_shown(runs_folder):
    found = run_cells("sample", models="digits-base", run="c", num_images=12, num_inference_steps=2)
    assert ("figures" not in found["evaluation"] and (runs_folder / "c" / "figures" / "samples.png").exists()
            and figures_table(found["evaluation"]) == "not measured")


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
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("import os; print(os.environ.get('DMP_WB_RUN'))")],
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(nb, tmp_path / "theirs.ipynb")
    done = papermill(tmp_path / "theirs.ipynb", tmp_path / "out.ipynb")
    assert done.returncode == 0, done.stderr
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[0].text == "None\n"
    assert not (tmp_path / "out.html").exists()


@pytest.mark.parametrize("first", ["import dmp_wb.runs", "import papermill"])
def test_engine_is_there_whichever_is_imported_first(first):
    code = (f"{first}; from papermill.engines import papermill_engines as e; print(e.get_engine(None).__name__, "
            "e.get_engine('dmp-wb').__name__)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.split() == ["RunEngine", "RunEngine"]


@pytest.mark.parametrize("file", sorted(RUNS.glob("*.ipynb")), ids=lambda f: f.stem)
def test_run_notebooks_say_what_they_do(file):
    nb = nbformat.read(file, 4)
    opening = nb.cells[0].source
    assert (nb.cells[0].cell_type == "markdown" and opening.startswith("# ")
            and "| parameter | meaning | default |" in opening)
    cells = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    said = {name: default for name, default in re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", opening, re.M)}
    given = dict(re.findall(r"^(\w+) = (.*)$", cells[0].source, re.M))
    assert {name: ast.literal_eval(value) for name, value in given.items()} == {
        name: "" if text == "empty" else text[1:-1] if text.startswith("`") else ast.literal_eval(text)
        for name, text in said.items()}
    assert nb.cells[-1].source.startswith("**Look at**") and nb.metadata.dmp_wb.page


def test_parameters_and_folders(tmp_path, monkeypatch, runs_folder):
    assert listed("a=1 b=2") == ["a=1", "b=2"] and listed(["a", 1]) == ["a", "1"] and listed("") == listed(None) == []
    assert (here("", "name") == runs_folder / "name" and here("x/y", "name") == runs_folder / "x/y"
            and here(str(tmp_path / "z"), "") == tmp_path / "z")
    monkeypatch.setenv("DMP_WB_RUN", str(tmp_path / "papermill"))
    assert here("", "name") == tmp_path / "papermill"


def test_the_page_of_a_failed_run_opens_with_what_failed_and_how_to_try_again(tmp_path, monkeypatch):
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    from dmp_wb.batch.page import COMMAND_VARIABLE, write_page
    monkeypatch.delenv(COMMAND_VARIABLE, raising=False)
    error = new_output("error", ename="ValueError", evalue="\x1b[31mno <b>such</b>\nthing", traceback=["here"])
    cells = [new_markdown_cell("# A run"), new_code_cell("x", execution_count=1), new_markdown_cell("## Works"),
             new_code_cell("y", execution_count=2, outputs=[error]),
             new_markdown_cell("## Never ran"), new_code_cell("z")]
    nb = new_notebook(cells=cells, metadata={"papermill": {"input_path": "a b.ipynb", "output_path": "out.ipynb",
                                                           "parameters": {"overrides": ["name=it's 01"]}}})
    page = lambda: write_page(nb, tmp_path / "run.html").read_text().split("<main>")[1]
    assert re.match(r'\s*<div class="failed" role="alert"><h2>Failed in cell 2</h2><p><code>ValueError: no '
                    r'&lt;b&gt;such&lt;/b&gt; thing</code>', page())
    assert "Never ran" not in page() and "Works" in page() and len(nb.cells) == 6   # the notebook itself keeps all
    assert "papermill &#x27;a b.ipynb&#x27; out.ipynb -y" in page() and "name=it" in page()
    (tmp_path / "run.json").write_text("{}")
    assert "start the same sweep once more" in page()
    monkeypatch.setenv(COMMAND_VARIABLE, "dmp-wb run patch -p optim.lr 1")
    assert "<pre>dmp-wb run patch -p optim.lr 1</pre>" in page()
    nb.cells[3].metadata["tags"] = ["raises-exception"]
    assert "Failed in" not in page() and "Never ran" in page()
    nb.cells[3].outputs = []
    assert "Failed in" not in page() and "Never ran" in page()


def test_a_picture_on_a_page_has_the_text_of_its_cell(tmp_path):
    import nbformat

    from dmp_wb.batch.page import write_page
    png = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
    output = nbformat.v4.new_output("display_data", {"image/png": png}, metadata={"image/png": {"alt": "gates"}})
    cell = nbformat.v4.new_code_cell('#| fig-alt: Gates of four blocks <now>\nplot()', outputs=[output])
    page = write_page(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "run.html").read_text(encoding="utf-8")
    alt = re.search(r'<img[^>]*alt="([^"]*)"', page)[1]
    assert alt == "Gates of four blocks &lt;now&gt;", alt
    assert cell.outputs[0]["metadata"] == {"image/png": {"alt": "gates"}}, "the notebook is as it was"
