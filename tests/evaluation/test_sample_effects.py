"`sample_effects`, `sample_run` with other gates, and the page of what a run needs."
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from test_effects import known, only_there  # noqa: F401

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.evaluation import sample_effects as room
from dmp_wb.evaluation.draw import draw
from dmp_wb.evaluation.sample_effects import sample_effects
from dmp_wb.look import viz
from dmp_wb.methods.interventions import intervene, turned_off

HOW = dict(sampler="ddim", num_inference_steps=10, guidance_scale=1.0, quiet=True)


@pytest.fixture(scope="module")
def slanted(): return wb.load_model("digits-slanted", device="cpu")


def test_samples_change_in_the_one_place_where_the_patch_acts(known):  # noqa: F811
    model, data = known
    with only_there(model):
        found = sample_effects("digits-base", intervals=5, num_images=20, backbone=model, **HOW)
    there = torch.zeros(5, 4, dtype=torch.bool)
    there[1, 1] = True
    for what in ("needed", "alone"):
        moved = found.pixels[what]
        assert moved.shape == (5, 4, 20) and (moved[~there] == 0).all() and (moved[there] > 0).all()
        assert torch.equal(moved[1, 1], found.pixels["without"][0, 0])
    assert found.blocks == [(0,), (1,), (2,), (3,)] and found.spans[1] == (200, 399)


def test_a_map_that_was_cut_off_goes_on_and_another_one_begins_anew(slanted, tmp_path, monkeypatch):
    again = lambda **how: sample_effects("digits-slanted", "timesteps", 2, 60, backbone=slanted, extractor="digits",
                                         folder=tmp_path, num_shown=3, **{**HOW, **how})
    whole = again()
    drawn = []
    cells = sorted(p.stem for p in tmp_path.rglob("*.safetensors"))
    assert cells == ["alone-0-499-0_1_2_3", "alone-500-999-0_1_2_3", "as-it-is", "needed-0-499-0_1_2_3",
                     "needed-500-999-0_1_2_3", "without"]
    next(tmp_path.rglob("alone-0*")).write_bytes(b"half")
    next(tmp_path.rglob("needed-5*")).unlink()
    monkeypatch.setattr(room, "draw", lambda *a, **k: drawn.append(1) or draw(*a, **k))
    same = again()
    assert len(drawn) == 2
    for what in whole.pixels: assert torch.equal(whole.pixels[what], same.pixels[what])
    assert whole.frechet == same.frechet
    again(seed=1)
    assert len(drawn) == 2 + 6 and len(list(tmp_path.iterdir())) == 2
    with intervene(slanted, scale=0.5): again()
    assert len(drawn) == 2 + 12


class Net(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((64, 4), float(weight)))

    def forward(self, x): return x.flatten(1) @ self.weight


NET = "import torch\ndef net(): return torch.nn.Sequential(torch.nn.{}(2), torch.nn.Flatten())\n"


def test_features_of_another_network_of_the_same_name_are_not_taken(slanted, tmp_path):
    ask = lambda extractor, name: sample_effects("digits-slanted", "timesteps", 1, 4, backbone=slanted, num_shown=1,
                                                 extractor=extractor, folder=tmp_path / name, **HOW).features["needed"]
    first = ask(Net(1), "cells")
    assert torch.equal(ask(Net(1), "cells"), first) and len(list((tmp_path / "cells").iterdir())) == 1
    assert torch.equal(ask(Net(2), "cells"), ask(Net(2), "fresh")) and not torch.equal(ask(Net(2), "cells"), first)
    file = tmp_path / "own_net.py"
    for n, layer in enumerate(("AvgPool2d", "MaxPool2d")):
        file.write_text(NET.format(layer))
        ask(f"{file}:net", "of a file")
        assert len(list((tmp_path / "of a file").iterdir())) == n + 1


def test_the_known_patch_slants_in_the_late_steps_and_the_distance_says_so(slanted):
    found = sample_effects("digits-slanted", "timesteps", 4, 120, backbone=slanted, extractor="digits", **HOW)
    worse = [row[0]["difference"] for row in found.frechet["needed"]]
    better = [row[0]["difference"] for row in found.frechet["alone"]]
    assert worse[0] > 3 and better[0] < -3 and abs(worse[3]) < 0.3 * worse[0]
    assert found.frechet["without"][0][0]["difference"] > worse[0]
    low, high = found.interval()
    assert (low <= found.pixels["needed"].mean(-1)).all() and (found.pixels["needed"].mean(-1) <= high).all()
    viz.sample_effect_curves(found), viz.sample_effect_maps(found)
    for figure in (viz.sample_effect_curves(found, axis="log-snr"), viz.sample_effect_maps(found, axis="log-snr")):
        over = [ax for ax in figure.axes if ax.get_xlabel()]
        assert over and {ax.get_xlabel() for ax in over} == {"log-SNR"}
        assert all(ax.get_xlim()[0] > 8 > -8 > ax.get_xlim()[1] for ax in over)
    rows = viz.interval_samples(found, "alone")
    assert [*rows] == ["on everywhere", "on 0–249", "on 250–499", "on 500–749", "on 750–999", "off everywhere"]


def test_what_cannot_be_asked_of_samples_is_one_line(slanted):
    with pytest.raises(BadInput, match="has no method on it"): sample_effects("digits-base", **HOW)
    with pytest.raises(BadInput, match="by is .'blocks', 'prompts'.: expected timesteps, blocks or both"):
        sample_effects("digits-slanted", ("blocks", "prompts"), backbone=slanted, **HOW)
    with pytest.raises(BadInput, match="method"):
        sample_effects("digits-slanted", backbone=slanted, method="dtr", intervals=1, num_images=2, **HOW)


def pixels(folder): return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))])


def test_files_with_another_gate_go_elsewhere_and_say_so(runs_folder):
    how = dict(num_images=6, sampler="ddim", num_inference_steps=5, npz=False, quiet=True, device="cpu")
    usual, base = wb.sample_run("digits-slanted", **how), wb.sample_run("digits-slanted", **how, patched=False,
                                                                       folder=runs_folder / "base")
    off, late = wb.sample_run("digits-slanted", **how, gate="off"), wb.sample_run("digits-slanted", **how,
                                                                                 patch_interval=(0, 199))
    assert (off.name, late.name) == ("ddim-5-g1.5-6-off", "ddim-5-g1.5-6-t0-199")
    assert (pixels(off) == pixels(base)).all() and (pixels(late) != pixels(base)).any()
    assert (pixels(late) != pixels(usual)).any() and "interventions" not in json.loads(
        (usual / "sampling.json").read_text())
    assert json.loads((off / "sampling.json").read_text())["interventions"][0]["how"] == "off"
    for folder, settings in ((usual, dict(gate="off")), (off, {})):   # neither takes the other's folder
        with pytest.raises(BadInput, match="holds images of something else: interventions is"):
            wb.sample_run("digits-slanted", **how, **settings, folder=folder)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(gate="half"), "gate is 'half': expected off, mean, uniform, shuffled, at=TIMESTEP or scale=STRENGTH"),
    (dict(gate="at=1000"), "at is 1000.0: expected a timestep in 0 to 999"),
    (dict(gate="scale=nan"), "gate is 'scale=nan'"),
    (dict(patch_interval=(0,)), "patch_interval"), (dict(patch_interval=(300, 200)), "timesteps is .300, 200."),
    (dict(patch_interval=5), "patch_interval"), (dict(gate="off", patched=False), "patched is False"),
])
def test_gates_that_there_are_not(settings, message, runs_folder):
    with pytest.raises(BadInput, match=message):
        wb.sample_run("digits-slanted", 2, sampler="ddim", num_inference_steps=2, quiet=True, device="cpu", **settings)
    assert not list(runs_folder.rglob("*.png"))


def test_turned_off_here_is_on_elsewhere(slanted):
    x, t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([50, 150, 250, 350])
    answer = lambda: slanted(x, timestep=t, class_labels=torch.arange(4)).sample.detach()
    usual = answer()
    with turned_off(slanted): none = answer()
    with turned_off(slanted, (100, 299)): assert torch.equal(answer(), torch.cat([usual[:1], none[1:3], usual[3:]]))
    with turned_off(slanted, (100, 299), but=True):
        assert torch.equal(answer(), torch.cat([none[:1], usual[1:3], none[3:]]))
    with turned_off(slanted, blocks=()): assert torch.equal(answer(), usual)
    with turned_off(slanted, (0, 999), but=True): assert torch.equal(answer(), usual)
    assert torch.equal(answer(), usual)


def test_the_page_of_what_a_run_needs(tmp_path, runs_folder):
    command = [sys.executable, "-m", "dmp_wb", "needs", "digits-slanted", "--output", str(tmp_path / "page.html"),
               "--intervals", "3", "--num-loss-images", "16", "--num-images", "20", "--num-inference-steps", "4",
               "--sample-blocks"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "They are needed most at timesteps" in html and html.count("<img") == 7
    assert not re.findall(r"https?://(?!www\.w3\.org)", re.sub(r'src="data:[^"]*"', "", html)) and "<script" not in html
    home = runs_folder / "digits-slanted" / "needs"
    found = json.loads((home / "needs.json").read_text())
    assert len(found["whole"]) == 3 and np.load(home / "needs.npz")["pixels_needed"].shape == (3, 1, 20)
    assert len({*home.rglob("*.safetensors")}) == 2 * (2 + 2 * 3) + 2 * 3 * 3   # a map by block has cells of its own
    for wrong, message in ((["digits-base"], "has no method on it"),
                           (["digits-slanted", "--intervals", "0"], "intervals is 0")):
        failed = subprocess.run([*command[:3], "needs", *wrong], capture_output=True, text=True, cwd=tmp_path)
        assert failed.returncode == 2 and message in failed.stderr, failed.stderr
    assert not (tmp_path / "needs.html").exists()   # no page that failed is left, in place of another run's
