"""What the explorers offer beside their sliders: axes, maps that can be dragged, changes that are switched on,
slots for two models, grids, text conditions, figures and code to take away. Without a browser."""
import base64
import html
import io
import json
import re

import numpy as np
import pytest
import torch
from backbones import BACKBONES
from conftest import tiny_dit
from PIL import Image

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.look.axis import time_axis
from dmp_wb.look.explore import DenoiseExplorer, GateExplorer, RoutingExplorer, RunExplorer
from dmp_wb.look.maps import Map


@pytest.fixture(autouse=True)
def looked_at(monkeypatch): monkeypatch.setenv("DMP_WB_EXPLORE", "live")


def pixels(widget): return np.asarray(Image.open(io.BytesIO(widget.value)).convert("RGB"))


def told(place: Map) -> dict:
    "What the page is told about a map."
    return {k: html.unescape(v) for k, v in re.findall(r'data-(\w+)="([^"]*)"', place.over.value)}


def values(place: Map) -> np.ndarray:
    data = told(place)
    raw = np.frombuffer(base64.b64decode(data["values"]), np.uint8).reshape(len(json.loads(data["rows"])), -1)
    return float(data["low"]) + raw / 254 * (float(data["high"]) - float(data["low"]))


def two_patches():
    model = tiny_dit()
    for name in ("one", "two"):
        patch = wb.patch(model, wb.DMPConfig(init="random"), name=name)
        with torch.no_grad(): patch.gate.weight.normal_(std=1.0)
    return model


@pytest.mark.parametrize("axis", ["timestep", "log-snr", "step"])
def test_a_drag_on_the_map_means_the_timestep_below_the_pointer(axis):
    e = GateExplorer("digits-dmp", axis=axis)
    data, t = told(e.map), json.loads(told(e.map)["x"])
    assert data["slider"] == "dmp-wb-at-timestep" and data["slider"] in e.timestep._dom_classes
    assert len(t) == len(json.loads(data["columns"])) == (25 if axis == "step" else 500)
    places = time_axis(axis).of(t)
    assert (np.diff(places) >= 0).all() or (np.diff(places) <= 0).all()
    assert (t[0] > t[-1]) == (axis == "step")   # the noise is at the right, but a sampler begins with it
    # the value under the pointer is the gate, relative to uniform
    column = len(t) // 3
    e.timestep.value = t[column]
    gate = e.gates(0)[e._row(), 1, 5] * e.patch.counts[1]
    found = 2 ** values(e.map)[e.patch.counts[0] + 5, column]
    assert found == pytest.approx(np.clip(gate, 1 / 8, 8), rel=0.03)
    assert json.loads(data["rows"])[e.patch.counts[0] + 5] == f"block {e.patch.blocks[1]}, prompt 5"
    assert time_axis(axis).label in e.map.over.value and "uniform" in e.map.over.value


def test_all_blocks_are_stacked_and_one_has_the_numbers_of_its_prompts():
    e = GateExplorer("digits-dmp")
    assert e.block.value == -1 and pixels(e.heatmap).shape[0] == sum(e.patch.counts)
    assert all(f"block {b}" in e.map.over.value for b in e.patch.blocks)
    e.block.value = 1
    assert pixels(e.heatmap).shape[0] == e.patch.counts[1] and ">12<" in e.map.over.value
    assert "block 1" in e.heatmap.tooltip and "timestep 250" in e.heatmap.tooltip


def test_a_change_is_switched_on_where_one_asks_for_it():
    e = GateExplorer("digits-dmp")
    before = e.gates(0).copy()
    assert e.other.layout.display == "none"
    e.switches.how.value, e.switches.within.value, e.switches.blocks.value = "off", (0, 99), (2,)
    changed = (e.gates(0) != before).any(-1)
    assert (changed == ((e.grid < 100)[:, None] & (np.array(e.patch.blocks) == 2))).all()
    assert e.other.layout.display is None and "as trained" in e.other.title.value and "(0, 99)" in e.map.title.value
    e.switches.within.value, e.switches.blocks.value = (0, e.T - 1), ()
    for how in ("mean", "uniform", "shuffled", "at", "scale"):
        e.switches.how.value = how
        with e.switches.acting(e.model): want = e.patch.gates(torch.as_tensor(e.grid)).detach().numpy()
        assert np.allclose(e.gates(0), want) and not np.allclose(want, before), how
    e.switches.how.value = ""
    assert np.array_equal(e.gates(0), before) and e.other.layout.display == "none"


def test_denoising_shows_what_switching_off_changes():
    e = DenoiseExplorer("digits-dmp")
    usual = e.walk("patched")[2]
    e.switches.how.value = "off"
    assert (e.choices["A"].value, e.choices["B"].value) == ("patched", "changed")
    assert torch.equal(e.walk("changed")[2], e.walk("base")[2])   # off everywhere is the base
    e.switches.within.value = (500, 999)
    model = wb.load_model("digits-dmp")
    with wb.intervene(model, timesteps=(500, 999)):
        want = wb.sample(model, class_labels=[0], num_inference_steps=25, seed=0, quiet=True)
    assert torch.allclose(e.walk("changed")[2][-1], want, atol=1e-5)
    assert not torch.equal(want, usual[-1]) and np.abs(e.trajectories()[1]).max() > 0
    e.switches.how.value = ""
    assert (e.choices["A"].value, e.choices["B"].value) == ("base", "patched")


def test_the_first_steps_set_neither_the_scale_nor_where_it_opens():
    e = DenoiseExplorer("digits-slanted")
    _, change, limit = e.trajectories()
    told = e._told(["base", "patched"])
    assert not told[0] and told[-1] and e.step.value > 0 and limit == pytest.approx(np.abs(change[told]).max())
    assert all(x0.abs().max() <= 1 for _, _, x0 in e.trajectories()[0].values())


@pytest.mark.parametrize("axis", ["timestep", "log-snr", "step"])
def test_the_strip_leads_to_its_steps(axis):
    e = DenoiseExplorer("digits-dmp", axis=axis)
    steps, times = json.loads(told(e.strip)["x"]), e.trajectories()[0]["base"][0]
    assert set(steps) == set(range(26 if axis == "step" else 25)) and told(e.strip)["slider"] in e.step._dom_classes
    assert steps == sorted(steps, reverse=axis != "step")
    assert f"t = {times[steps[3]]}" in json.loads(told(e.strip)["columns"])[3]
    before = e.strip.picture.value
    e.step.value = 20
    assert e.strip.picture.value != before


def test_a_grid_of_seeds_and_classes():
    e = DenoiseExplorer("digits-dmp")
    one = {}
    for seed, label in ((0, 0), (3, 7)):
        e.seed.value, e.label.value = seed, label
        one[seed, label] = e.walk("patched")[2][-1, 0]
    e.seed.value = 0
    e.view.value = "seeds × classes"
    images = e.walk("patched")[2][-1]
    assert len(images) == 40
    for (seed, label), want in one.items(): assert torch.allclose(images[10 * seed + label], want, atol=1e-4)
    found, change, _ = e.trajectories()
    assert found["base"][2].shape[-1] > 80 and change.shape[1:] == found["base"][2].shape[2:]
    assert e.static().axes and "compare_samples" in e.code()


def test_slots_hold_two_patches_or_two_runs():
    model = two_patches()
    gates = GateExplorer(model, name="one", against="two")
    assert gates.other.layout.display is None and "two" in gates.other.title.value
    want = wb.get_patch(model, "two").gates(torch.as_tensor(gates.grid)).detach().numpy()
    assert np.allclose(gates.B.table(0), want) and not np.allclose(gates.A.table(0), want)
    titles = [ax.get_title() for ax in gates.static().axes if ax.get_title()]
    assert titles[::len(titles) // 2] == ["DiT, one: block 0", "DiT, two: block 0"]
    walk = DenoiseExplorer(model, name="one", against="two")
    assert walk.choices["B"].value == "DiT, two" and walk.ways["patched"].looked.patch == "one"
    with wb.patch_disabled(model, "one"):
        alone = wb.sample(model, class_labels=[0], num_inference_steps=25, seed=0, quiet=True)
    assert torch.allclose(walk.walk("DiT, two")[2][-1], alone, atol=1e-5)
    runs = DenoiseExplorer("digits-dmp", against=["digits-slanted"])
    assert runs.modes == ["base", "patched", "digits-slanted"] and runs.choices["B"].value == "digits-slanted"
    with pytest.raises(BadInput, match="expected the name of one"): GateExplorer(model)
    with pytest.raises(BadInput, match="did you mean 'one'"): GateExplorer(model, name="onne")
    with pytest.raises(BadInput, match=r"fashion-base takes images of \(1, 28, 28\): expected \(1, 8, 8\)"):
        DenoiseExplorer("digits-dmp", against="fashion-base")


CONDITIONS = {"UNet2DConditionModel-SD15": lambda m: {"encoder_hidden_states": torch.randn(2, 5, 32)},
              "SD3Transformer2DModel": lambda m: {"encoder_hidden_states": torch.randn(2, 5, 64),
                                                  "pooled_projections": torch.randn(2, m.config.pooled_projection_dim)}}


@pytest.mark.parametrize("name", CONDITIONS)
def test_models_of_texts_take_conditions(name):
    model = BACKBONES[name]()
    given = CONDITIONS[name](model)
    patch = wb.patch(model, wb.DMPConfig(init="random"), name="style")
    with torch.no_grad():
        for p in patch.parameters(): p.normal_(std=0.2)
    for make in (DenoiseExplorer, lambda m: GateExplorer(m, image=torch.zeros(m.config.in_channels, 8, 8))):
        with pytest.raises(BadInput, match=f"{type(model).__name__} takes encoder_hidden_states.*expected conditions"):
            make(model)
    nulls = {k: torch.zeros_like(v[0]) for k, v in given.items()}
    e = DenoiseExplorer(model, conditions=given, null_conditions=nulls, captions=["a cat", "a dog"], name="style")
    assert e.label.options[1][0] == "a dog" and not e.guidance.disabled
    first = e.walk("patched")[2]
    e.label.value = 1
    assert not torch.equal(e.walk("patched")[2], first)
    assert "conditions={k: v[[1]] for k, v in conditions.items()}" in e.code()
    assert DenoiseExplorer(model, conditions=given).guidance.disabled   # nothing to guide away from
    image = torch.zeros(model.config.in_channels, *(model.config.sample_size,) * 2)
    gates = GateExplorer(model, image, conditions=given, captions=["a cat", "a dog"])
    before = gates.clean.value
    gates.label.value = 1
    assert gates.clean.value != before
    with pytest.raises(BadInput, match="1 captions: expected 2"):
        DenoiseExplorer(model, conditions=given, captions=["x"])


def test_a_model_of_packed_tokens_shows_its_gates_and_no_images():
    model = BACKBONES["FluxTransformer2DModel"]()
    wb.patch(model, wb.DMPConfig(init="random"))
    with pytest.raises(BadInput, match=r"this FluxTransformer2DModel takes no images \[B, C, H, W\]"):
        DenoiseExplorer(model)
    e = GateExplorer(model, axis="log-snr")
    assert pixels(e.heatmap).any() and e.noisy.value == b""
    assert e.A.kind == "flow_prediction"


@pytest.mark.parametrize("make", [
    lambda: GateExplorer("digits-dmp", axis="log-snr"), lambda: RoutingExplorer(64, axis="step"),
    lambda: GateExplorer("digits-dmp", against="digits-slanted"),
    lambda: DenoiseExplorer("digits-dmp"), lambda: RunExplorer(["digits-base", "digits-dmp"])])
def test_the_code_draws_the_figure(make):
    e = make()
    if hasattr(e, "switches"): e.switches.how.value, e.switches.within.value = "off", (0, 199)
    if hasattr(e, "block"): e.block.value = 1
    *lines, last = e.code().splitlines()
    space = {}
    exec("\n".join([*lines, f"figure = {last}"]), space)
    drawn = []
    for figure in (e.static(), space["figure"]):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=60)
        drawn.append(np.asarray(Image.open(buffer).convert("RGB")))
    assert drawn[0].shape == drawn[1].shape and np.abs(drawn[0].astype(int) - drawn[1]).max() <= 3
    e.show_code()
    assert html.escape(last) in e.given.value and "<button type='button'" in e.given.value


def test_the_code_sets_the_strength_at_which_a_patch_acts():
    model = two_patches()
    wb.get_patch(model, "two").strength = 0.25
    lines = DenoiseExplorer(model).code().splitlines()
    assert "wb.get_patch(model, 'two').strength = 0.25" in lines
    assert not any("'one'" in line for line in lines)   # it acts as it was trained
    wb.use_patches(model, "one", "two", weights=[1, 1])
    assert ".strength" not in GateExplorer(model, name="one").code()


def test_the_code_leaves_out_the_strength_that_a_run_is_loaded_with(tmp_path, monkeypatch):
    loaded = wb.load_model("digits-dmp", device="cpu")
    wb.get_patch(loaded).strength = 2
    monkeypatch.setattr("dmp_wb.look.sides.load_model", lambda *args, **settings: loaded)
    e = DenoiseExplorer("digits-dmp")
    assert ".strength" not in e.code()
    wb.get_patch(loaded).strength = 0.5   # by hand, while it is looked at
    assert "wb.get_patch(model).strength = 0.5" in e.code().splitlines()
    wb.get_patch(loaded).strength = 1
    assert "wb.get_patch(model).strength = 1.0" in e.code().splitlines()


def test_a_figure_is_saved_as_png_and_svg():
    e = RoutingExplorer(64)
    e.save()
    files = dict(re.findall(r"download='RoutingExplorer\.(\w+)' href='data:[\w/+]+;base64,([^']+)'", e.given.value))
    assert base64.b64decode(files["png"])[:4] == b"\x89PNG" and b"<svg" in base64.b64decode(files["svg"])


def test_a_sign_says_that_it_computes(monkeypatch):
    e, seen = DenoiseExplorer("digits-dmp"), []
    e.sign.observe(lambda change: seen.append(change.new), "value")
    e.step.value = 3
    assert not seen   # looked up
    e._took.clear()   # what was quick the last time needs no sign
    e.seed.value = 9
    assert any("denoising" in s and "role='status'" in s for s in seen) and e.sign.value == ""


@pytest.mark.parametrize("make", [lambda: GateExplorer("digits-dmp"), lambda: RoutingExplorer(64),
                                  lambda: GateExplorer("digits-dmp", against="digits-slanted"),
    lambda: DenoiseExplorer("digits-dmp"), lambda: RunExplorer(["digits-base"])])
def test_every_control_has_a_name_and_every_picture_words(make):
    import ipywidgets as widgets

    def parts(w):
        yield w
        for child in getattr(w, "children", ()): yield from parts(child)
    everything = list(parts(make()))
    controls = [w for w in everything if isinstance(w, widgets.Button) or hasattr(w, "value")
                and not isinstance(w, (widgets.HTML, widgets.Image))]
    assert len(controls) >= 5 and all(w.description.strip() for w in controls)
    drawn = [w for w in everything if isinstance(w, widgets.Image) and w.value]
    assert drawn and all(w.tooltip and len(w.tooltip.split()) >= 2 for w in drawn)
