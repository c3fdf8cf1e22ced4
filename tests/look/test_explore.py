"""The explorers without a browser: what their controls do to their
pictures, and the figure they leave where nobody can drag."""
import io
import json
import os

import numpy as np
import pytest
import torch
from conftest import tiny_dit
from matplotlib.figure import Figure
from PIL import Image

import dmp_wb as wb
from dmp_wb.look import explore, widgets
from dmp_wb.core.errors import BadInput
from dmp_wb.look.explore import DenoiseExplorer, GateExplorer, RoutingExplorer, RunExplorer
from dmp_wb.look.widgets import live, pixels_of


@pytest.fixture
def looked_at(monkeypatch): monkeypatch.setenv("DMP_WB_EXPLORE", "live")


def picture(widget): return np.asarray(Image.open(io.BytesIO(widget.value)).convert("RGB"))


def changed(act, *widgets):
    before = [w.value for w in widgets]
    act()
    return [w.value != b for w, b in zip(widgets, before, strict=True)]


def test_gates_follow_timestep_block_and_class(looked_at):
    e = GateExplorer("digits-dmp")
    assert picture(e.heatmap).shape[1] == 2 * len(e.grid) and "prompts in use" in e.top.value
    everything = e.heatmap, e.noisy, e.clean, e.spatial, e.top
    assert all(changed(lambda: setattr(e.timestep, "value", 900), *everything)) and "t = 900" in e.top.value
    assert changed(lambda: setattr(e.block, "value", 2), *everything) == [True, False, False, True, True]
    assert all(changed(lambda: setattr(e.label, "value", 7), e.noisy, e.clean))
    t, n = 900, e.patch.counts[2]
    gates = e.patch.gates(torch.tensor([int(e.grid[np.abs(e.grid - t).argmin()])])).detach()[0, 2, :n]
    assert f"prompt {int(gates.argmax())}<" in e.top.value
    line = picture(e.heatmap)[:, 2 * int(np.abs(e.grid - t).argmin())]
    assert (line == 0).all()


def test_a_conditioned_gate_looks_at_the_class(looked_at):
    model = tiny_dit()
    patch = wb.patch(model, wb.DMPConfig(gate_input="condition", init="random"))
    with torch.no_grad(): patch.gate.weight.normal_(std=1.0)
    e = GateExplorer(model, image=torch.zeros(1, 8, 8))
    assert e.conditioned and changed(lambda: setattr(e.label, "value", 3), e.heatmap, e.top) == [True, True]
    assert np.allclose(e.gates(3), patch.gates(torch.as_tensor(e.grid), torch.full((len(e.grid),), 3)).detach().numpy())


def test_routes_count_the_channels_two_timesteps_share(looked_at):
    e = RoutingExplorer(channels=64)
    for act in (lambda: setattr(e.ratio, "value", 0.5), lambda: setattr(e.alpha, "value", 1.0),
                lambda: setattr(e.width, "value", 384)):
        assert all(changed(act, e.masks, e.overlap, e.text)[:1])
    e.first.value, e.second.value = 0, 999
    m = wb.routing_mask(torch.tensor([0, 999]), 384, sharing_ratio=0.5, alpha=1.0).bool()
    assert f"shared: <b>{int((m[0] & m[1]).sum())}</b> of {int(m[0].sum())}" in e.text.value


def test_denoising_base_beside_patched(looked_at):
    e = DenoiseExplorer("digits-dmp")
    want = wb.sample(wb.load_model("digits-dmp"), class_labels=[0], guidance_scale=1.5,
                     num_inference_steps=25, seed=0, quiet=True)
    # it opens where the two differ most, among the steps at which an image can be told
    change = e.trajectories()[1]
    assert np.abs(change).mean((1, 2))[e.step.value] == max(np.abs(change).mean((1, 2))[e._told(["base", "patched"])])
    e.step.value = e.step.max
    shown = picture(e.pictures["patched", "x_0"])
    size = shown.shape[0] // 8
    # the last step is the image that sampling gives
    assert np.abs(shown[::size, ::size].astype(int) - pixels_of(want[0])).max() <= 1
    assert not np.array_equal(shown, picture(e.pictures["base", "x_0"]))
    assert all(changed(lambda: setattr(e.step, "value", 3), *e.pictures.values(), e.difference, e.text))
    kept = len(e._kept)
    assert any(changed(lambda: setattr(e.seed, "value", 5), *e.pictures.values())) and len(e._kept) == kept + 1
    e.steps.value = 10
    assert e.step.max == 10 and e.step.value <= 10
    assert DenoiseExplorer("digits-base").modes == ["model"]


def test_runs_and_runs_that_are_gone(looked_at, tmp_path):
    for name, loss in (("a", 1.0), ("b", 0.5)):
        (tmp_path / name / "samples").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("name: x\n")
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": s, "loss": loss / s, "mse/t000-499": None if s == 2 else loss}) + "\n"
                    for s in (1, 2, 3)))
        Image.new("L", (8, 8), 100).save(tmp_path / name / "samples" / "step-0000003.png")
    (tmp_path / "b" / "figures").mkdir()
    Image.new("RGB", (30, 20), (9, 8, 7)).save(tmp_path / "b" / "figures" / "gates.png")
    (tmp_path / "b" / "summary.json").write_text(
        json.dumps({"evaluations": [{"fid": 9.0}, {"fid": 1.25, "interval": {"fid": [1, 2]}}]}))
    e = RunExplorer([tmp_path / "a", tmp_path / "b"])
    assert len(e.pictures.children) == 2 and picture(e.curves).shape[1] > 300
    assert (changed(lambda: setattr(e.column, "value", "mse/t000-499"), e.curves) == [True]
            and "step 3, mse/t000-499 1" in e.table.value)
    assert "fid 1.25" in e.table.value
    e.picture.value = "gates"
    assert [picture(tile.children[1]).shape for tile in e.pictures.children] == [(20, 30, 3)]
    e.picture.value = "newest samples"
    (tmp_path / "a" / "config.yaml").unlink()
    e.chosen.value = ("a",)
    assert "files are gone" in e.table.value and e.curves.layout.visibility == "hidden" and not e.pictures.children


@pytest.mark.parametrize("make", [lambda: GateExplorer("digits-dmp"), lambda: RoutingExplorer(64),
                                  lambda: DenoiseExplorer("digits-dmp"), lambda: RunExplorer(["digits-base"])])
def test_where_nobody_looks_a_figure_is_left(make, monkeypatch):
    for name in ("JPY_SESSION_NAME", "VSCODE_PID", "VSCODE_CWD", "COLAB_RELEASE_TAG", "DMP_WB_EXPLORE"):
        monkeypatch.delenv(name, raising=False)
    assert not live()
    e = make()
    assert isinstance(e.static(), Figure) and set(e._repr_mimebundle_()) == {"image/png", "text/plain"}
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    assert live() and "application/vnd.jupyter.widget-view+json" in e._repr_mimebundle_()


def test_mistakes(looked_at, runs_folder):
    with pytest.raises(BadInput, match="digits-base has no patch: expected a patched model"):
        GateExplorer("digits-base")
    with pytest.raises(BadInput, match="did you mean 'digits-dmp'"): GateExplorer("digits-dmpp")
    with pytest.raises(BadInput, match="there are no runs in"): RunExplorer()
    model = tiny_dit()
    wb.patch(model, wb.DMPConfig(gate_input="none"))
    with pytest.raises(BadInput, match="prompt tuning, which has no gate"): GateExplorer(model)


def test_moving_sliders_leaves_nothing_behind(looked_at, tmp_path, monkeypatch):
    "Widgets and kept results stay as many over as many moves as one likes."
    for name in ("a", "b"):
        (tmp_path / name / "samples").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("name: x\n")
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "mse": 2.0}\n')
        Image.new("L", (8, 8), 100).save(tmp_path / name / "samples" / "step-0000003.png")
    from ipywidgets.widgets import widget
    alive = lambda: len(widget._instances if hasattr(widget, "_instances") else widget.Widget.widgets)
    runs = RunExplorer([tmp_path / "a", tmp_path / "b"])
    before = alive()
    for i in range(6): runs.column.value = ("mse", "loss")[i % 2]
    assert alive() == before and len(runs.pictures.children) == 2

    monkeypatch.setattr(explore._Kept, "__init__", lambda self, most=0, init=explore._Kept.__init__: init(self, 20_000))
    gates, walk = GateExplorer("digits-dmp", resolution=20), DenoiseExplorer("digits-dmp")
    for i in range(60): gates.timestep.value = 13 * i
    for i in range(4): walk.seed.value = i + 1
    size = lambda kept: sum(map(widgets._bytes_of, kept.values()))
    assert (1 < len(gates._seen) < 60 and size(gates._seen) <= 20_000 and len(walk._kept) == 1
            and set(gates._seen) == set(gates._seen.sizes))


def test_a_run_whose_files_are_pipes_holds_nothing_up(looked_at, tmp_path):
    (tmp_path / "a" / "samples").mkdir(parents=True)
    (tmp_path / "a" / "config.yaml").write_text("name: x\n")
    for name in ("summary.json", "samples/step-0000003.png"): os.mkfifo(tmp_path / "a" / name)
    explorer = RunExplorer([tmp_path / "a"])
    assert not explorer.pictures.children and "no such column yet" in explorer.table.value
