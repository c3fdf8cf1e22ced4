"Runs side by side: what differs, what can be compared, the page in a browser without a network."
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHROMIUM, run_cells, tiny_dit
from torch import nn

from dmp_wb.core import files
from dmp_wb.core.bars import progress
from dmp_wb.evaluation import draw
from dmp_wb.look import compare
from dmp_wb.look import tables
from dmp_wb.look import viz
from dmp_wb.store.run import load_model, open_run
from dmp_wb.config import load_experiment, to_yaml
from dmp_wb.core.errors import BadInput
from dmp_wb.core.paths import assets_folder
from dmp_wb.data.load import load_data
from dmp_wb.training.loop import train

TINY = ["model.hidden_size=16", "model.num_layers=2", "model.num_attention_heads=2", "train.batch_size=16",
        "train.log_every=5", "train.steps=10", "train.checkpoint_every=10"]


@pytest.fixture
def made(runs_folder):
    "make(name, overrides): a run folder with a config and nothing else."
    def make(name, *overrides):
        (runs_folder / name).mkdir(parents=True)
        (runs_folder / name / "config.yaml").write_text(
            to_yaml(load_experiment("digits-quick", [*overrides, f"name={name}"])))
        return runs_folder / name
    return make


@pytest.fixture
def copies(runs_folder):
    "The shipped runs as run folders of one's own."
    for name in ("digits-base", "digits-dmp"): shutil.copytree(assets_folder() / name, runs_folder / f"my-{name}")
    return runs_folder


def test_which_runs(made, runs_folder, monkeypatch):
    for name in ("sweep/a", "sweep/b", "other/a"): made(name)
    (runs_folder / "pictures").mkdir()
    c = tables.open_compared([str(runs_folder / "sweep"), str(runs_folder / "pictures"), "again:other/a",
                              runs_folder / "other" / "a", "digits-base"])
    assert list(c.runs) == ["sweep/a", "sweep/b", "again", "digits-base"]
    assert c.notes == ["runs/pictures is left out: it is no training run, which has a config.yaml",
                       "other/a is left out: it is the same run as again"]
    with pytest.raises(BadInput, match="unknown run 'other/b': did you mean 'other/a'"):
        tables.open_compared(["other/b"])
    with pytest.raises(BadInput, match="can be compared: expected training runs"):
        tables.open_compared([runs_folder / "pictures"])
    with pytest.raises(BadInput, match="no runs can be compared"): tables.open_compared([])
    with pytest.raises(BadInput, match="label 'x' is given to"): tables.open_compared(["x:digits-base", "x:digits-dmp"])
    assert "nothing is compared" in tables.open_compared(["digits-base"]).notes[0]
    monkeypatch.chdir(runs_folder)
    assert tables.labelled(["sweep/a", "other/a", "x:sweep/b"]) == {"sweep/a": "sweep/a", "other/a": "other/a",
                                                                    "x": "sweep/b"}


def test_what_differs():
    a, b = ({**files.flat(tables.dataclasses.asdict(load_experiment("digits-quick", over)))}
            for over in ([], ["optim.lr=1e-4", "train.compile=true", "patch.top_k=3", "name=z"]))
    # no patch is trained
    assert tables.differences({"a": a, "b": b}) == {"optim.lr": {"a": 2e-3, "b": 1e-4},
                                                    "train.compile": {"a": False, "b": True}}
    old = {k: v for k, v in a.items() if k != "train.compile"}
    assert (tables.differences({"old": old, "new": a}) == {}
            and tables.differences({"old": old, "b": b})["train.compile"] == {"old": False, "b": True})
    dmp = files.flat(tables.dataclasses.asdict(load_experiment("digits-dmp", ["patch.top_k=3"])))
    found = tables.differences({"a": a, "dmp": dmp})
    assert found["methods.dmp.top_k"] == {"dmp": 3} and found["model.hidden_size"] == {"a": 64}
    assert "methods.dmp.mode" not in found and not any(key.startswith("patch.") for key in found)
    assert tables.differences({"a": a, "yaml": {**a, "optim.betas": list(a["optim.betas"])}}) == {}


@pytest.mark.parametrize("settings", [{"sharing_ratio": 0.5}, {"alpha": 1.0}, {"kind": "random"},
                                      {"kind": "random", "seed": 7}, {"num_train_timesteps": 500}])
def test_the_masks_of_a_page_are_those_that_act(settings):
    from dmp_wb.methods.settings import DTRConfig
    from dmp_wb.methods.dtr import route
    model, seen = tiny_dit(), []
    route(model, DTRConfig(**settings))
    model.blocks[1].register_forward_pre_hook(lambda module, args, kwargs: seen.append(
        next(a for a in (*args, *kwargs.values()) if torch.is_tensor(a) and a.ndim == 3)), with_kwargs=True)
    t = torch.tensor([0, 100, 300, 499])
    with torch.no_grad(): model(torch.randn(4, 1, 8, 8), timestep=t, class_labels=torch.zeros(4, dtype=torch.long))
    acts = (seen[0] != 0).any(1)
    assert torch.equal(compare.masks_of(model, t)["32 channels"].bool(), acts) and not acts.all()


def test_a_broken_run_is_a_note_on_the_page_and_takes_no_other_down(copies):
    open_run("my-digits-base").note(evaluations=[3, {"fid": "x", "num_images": [], "guidance_scale": None,
                                                     "settings": 3, "intervals": {"fid": [1]}}], versions=[1],
                                    trained_parameters="many")
    for name, content in (("tag", "method: dmp\ntrain: {}\ndata: {}\nbase: !!python/name:os.system x\n"),
                          ("types", "method: dmp\ntrain: 3\ndata: [x]\n"), ("bombs", "[" * 100_000)):
        (copies / name).mkdir()
        (copies / name / "config.yaml").write_text(content)
    shutil.copytree(copies / "my-digits-dmp", copies / "odd-curve")
    (copies / "odd-curve" / "metrics.jsonl").write_text(
        '{"step": 1, "loss": "x"}\n{"step": [], "loss": 1}\n{"step": 2, "loss": 0.5}\n')
    c = tables.open_compared(["digits-base", "my-digits-base",
                              *(str(copies / n) for n in ("tag", "types", "bombs", "odd-curve"))])
    assert (list(c.runs) == ["digits-base", "my-digits-base", "odd-curve"]
            and [n.split(":")[0] for n in c.notes] == [f"{n} is left out" for n in ("tag", "types", "bombs")])
    tables.glance_table(c), tables.differences_table(c)
    for rows in tables.evaluations(c, 1).values(): tables.metrics_table(rows, list(c.runs))
    assert open_run(copies / "odd-curve").curve("loss") == {"step": [2], "loss": [0.5]} and any(
        "my-digits-base: no summary" in n for n in c.notes)


def test_tables_escape_what_they_show():
    html = tables.html_table({"<b>": {"x&y": tables.Cell("<script>", "<i>", True)}}, ["x&y", "z"], {"z": "#fff"},
                             "<corner>")
    assert ("<script>" not in html and "<b>&lt;script&gt;</b>" in html and "&lt;corner&gt;" in html
            and "x&amp;y" in html and html.count("<td>") == 2)


def test_evaluations_with_the_same_settings(copies):
    row = {"guidance_scale": 1.5, "sampler": "ddim", "num_inference_steps": 50, "seed": 0, "reference": "digits",
           "num_images": 100, "num_reference": 1797, "extractor": "digits"}
    for name, rows in (("my-digits-base",
                        [row | {"fid": 2.0, "intervals": {"fid": [1.5, 2.5]}}, row | {"guidance_scale": 3, "fid": 9}]),
                       ("my-digits-dmp", [row | {"fid": 1.0, "precision": 0.5}, row | {"seed": 1, "fid": 7}])):
        open_run(name).note(evaluations=rows)
    found = tables.evaluations(tables.open_compared(["a:my-digits-base", "b:my-digits-dmp"]))
    assert (len(found) == 1 and next(iter(found)).startswith("100 samples against 1797 images of digits")
            and set(next(iter(found.values()))) == {"a", "b"})
    html = tables.metrics_table(next(iter(found.values())), ["a", "b"])
    assert "<b>1</b>" in html and "1.5 – 2.5" in html and html.count("<td>–</td>") == 1
    assert len(tables.evaluations(tables.open_compared(["my-digits-base"]))) == 2
    several = [row | {"fid": 1.0}, row | {"seed": 1}, row | {"settings": {"k": 7}}, row | {"reference": "a/digits"}]
    open_run("my-digits-base").note(evaluations=several)
    words = list(tables.evaluations(tables.open_compared(["my-digits-base"])))
    assert [w.split("guidance 1.5, ")[1] for w in words] == ["seed 0 (reference digits)", "seed 1", "seed 0, k 7",
                                                             "seed 0 (reference a/digits)"]


def test_the_same_seeds_and_noise(copies):
    base, again = (draw.draw("digits-base", 12, num_inference_steps=3, quiet=True),
                   draw.draw("my-digits-base", 12, num_inference_steps=3, batch_size=5, quiet=True))
    assert torch.allclose(base.images, again.images, atol=1e-5) and base.labels.tolist() == [*range(10), 0, 1]
    assert not torch.allclose(base.images,
                              draw.draw("digits-base", 12, num_inference_steps=3, seed=1, quiet=True).images, atol=1e-2)
    model, exp, data = load_model("digits-base"), open_run("digits-base").experiment, load_data("digits")
    spans, mse = compare.mse_by_timestep(model, exp, data, 64, 4)
    assert spans == [(0, 249), (250, 499), (500, 749), (750, 999)] and mse.shape == (4,) and (mse.diff() < 0).all()
    assert torch.equal(mse, compare.mse_by_timestep(model, exp, data, 64, 4)[1]) and not torch.equal(
        mse, compare.mse_by_timestep(model, exp, data, 64, 4, seed=1)[1])

    class Zero(nn.Module):   # predicts no noise at all: its mse is the noise's mean square
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))
        def forward(self, x, timestep, class_labels=None): return type("Out", (), {"sample": torch.zeros_like(x)})
    assert compare.mse_by_timestep(Zero(), exp, data, 256, 4)[1].sub(1).abs().max() < 0.03


def test_distances_are_paired(copies):
    drawn = {name: draw.draw(run, 80, num_inference_steps=3, quiet=True)
             for name, run in (("a", "digits-base"), ("same", "my-digits-base"), ("dmp", "digits-dmp"))}
    f = compare.paired_distances(drawn, "digits", rounds=50)
    assert (f["same"]["difference"] == pytest.approx(0, abs=1e-5)
            and f["same"]["difference_interval"] == pytest.approx([0, 0], abs=1e-5))
    width = lambda pair: pair[1] - pair[0]
    assert width(f["dmp"]["difference_interval"]) < width(f["dmp"]["interval"]) / 2 and "accuracy" in f["a"]
    assert "difference to a" in compare.distances_table(f) and "excludes 0" in compare.distances_table(
        {**f, "dmp": {**f["dmp"], "difference_interval": [0.1, 0.2]}})
    few = {k: draw.Drawn(d.images[:20], d.labels[:20]) for k, d in drawn.items()}
    with pytest.raises(BadInput, match="raise num_images"): compare.paired_distances(few, "digits")
    with pytest.raises(BadInput, match="images of 2 sizes"):
        compare.paired_distances({**drawn, "big": draw.Drawn(torch.zeros(80, 3, 16, 16), None)}, "digits")


def test_what_cannot_be_compared_is_said_and_the_rest_is(made, copies, runs_folder, monkeypatch):
    made("unfinished")
    made("photos", "data.name=photos", "data.size=64")
    train("digits-quick", [*TINY, "objective.prediction_type=v_prediction", "name=v"])
    torn = runs_folder / "torn"
    shutil.copytree(assets_folder() / "digits-base", torn)
    (torn / "model" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    c = tables.open_compared(["digits-base", "digits-dmp", "v", "unfinished", "photos", "torn", "gone:my-digits-base"])
    shutil.rmtree(runs_folder / "my-digits-base")   # while they are compared
    counted = []
    monkeypatch.setattr(compare, "progress", lambda **given: counted.append(progress(**given)) or counted[0])
    looked = compare.look_at(c, 10, 16, num_inference_steps=2)
    assert counted[0].n == counted[0].total   # a bar that has ended leaves the page
    assert (list(looked.drawn) == ["digits-base", "digits-dmp", "v"]
            and list(looked.mse) == ["digits-base", "digits-dmp"] and list(looked.gates) == ["digits-dmp"])
    said = "\n".join(c.notes)
    for pattern in ("the loss of v cannot be compared with digits-base's: objective.prediction_type is v_prediction "
                    "there and epsilon", "the loss of photos .* data.name is photos",
                    "unfinished: .* holds no model yet",
                    "torn: no samples, gates or masks", "gone: no samples, gates or masks"):
        assert re.search(pattern, said), pattern
    assert "gone" in tables.glance_table(c) and "photos" in tables.differences_table(c)


def test_runs_have_their_own_names_and_colours_by_them(made, runs_folder):
    compared = tables.open_compared(["digits-base", "other:digits-dmp"])
    colours = compare.colours_of(compared)
    assert colours == {"digits-base": viz.method_colour("base"), "other": viz.method_colour("dmp")}
    assert viz.method_label("dmp") == "DMP" and viz.method_label("dmp", {"dmp": "#000"}) == "dmp"


def test_the_notebook_with_one_run_and_nothing_measured(runs_folder):
    found = run_cells("compare", runs=["digits-base"], run="one", num_images=0, num_loss_images=0)
    assert (not found["looked"].drawn
            and {p.name for p in (runs_folder / "one" / "figures").iterdir()} == {"curve-loss.png"})


def test_the_page_from_the_command_line(made, tmp_path, runs_folder, request):
    made("unfinished")
    train("digits-dtr", [*TINY, "name=routed"])
    done = subprocess.run([sys.executable, "-m", "dmp_wb", "compare", "digits-base", "digits-dmp", "routed",
                           "unfinished", "--num-images", "80", "--num-inference-steps", "4", "--output",
                           str(tmp_path / "page.html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    html = (tmp_path / "page.html").read_text(encoding="utf-8").replace("<wbr/>", "<wbr>")
    assert (re.search(r"page.html: 0\.\d MB", done.stdout) and len(html) < 1_000_000
            and [p.name for p in tmp_path.iterdir() if p.suffix] == ["page.html"])
    for text in ("difference to digits-base", "pretrain + dtr", "holds no model yet", "optim.<wbr>lr"):
        assert text in html
    assert html.count("<img") == 7   # distances, samples, curve, loss and needs by timestep, gates, masks
    assert not re.findall(r"https?://(?!www\.w3\.org)", re.sub(r'src="data:[^"]*"', "", html)) and "<script" not in html
    if CHROMIUM: look_in_a_browser(request.getfixturevalue("browser"), tmp_path / "page.html", tmp_path)
    failed = subprocess.run([sys.executable, "-m", "dmp_wb", "compare", "digits-base", "routd"], capture_output=True,
                            text=True, cwd=tmp_path)
    assert (failed.returncode == 2 and "did you mean 'routed'" in failed.stderr
            and not (tmp_path / "compare.html").exists())


def look_in_a_browser(browser, page: Path, tmp_path: Path):
    """Nothing is asked for beside the file, every picture is there,
    nothing sticks out, at desk and phone width, light and dark."""
    folder = Path(os.environ.get("DMP_WB_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    paper = set()
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
        tab = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme,
                                  offline=True).new_page()
        asked, complaints = [], []
        tab.on("request", lambda r, asked=asked: asked.append(r.url) if not r.url.startswith("data:") else None)
        tab.on("console", lambda m, complaints=complaints: complaints.append(m.text))
        tab.goto(page.as_uri())
        assert asked == [page.as_uri()] and complaints == []
        assert tab.evaluate("[...document.images].length > 0 && [...document.images].every((i) => i.complete && "
                            "i.naturalWidth > 0 && i.alt)")
        # wide tables and figures scroll by themselves
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        paper.add(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        tab.screenshot(path=folder / f"compare-{width}-{scheme}.png", full_page=True)
    assert len(paper) == 2
