"Samples of comparisons are kept in the run folders, and taken only where they are what would be drawn."
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from threading import Barrier, get_ident

import pytest
import torch
from safetensors.torch import load_file, save_file

import dmp_wb as wb
from dmp_wb.core import registries
from dmp_wb.core.errors import BadInput
from dmp_wb.core.paths import assets_folder
from dmp_wb.core.settings import DataConfig
from dmp_wb.evaluation import draw as room, extractors
from dmp_wb.evaluation.draw import draw, Drawn
from dmp_wb.evaluation.features import accuracy_of, fashion_classifier, ModuleFeatures
from dmp_wb.look import compare, tables, viz
from dmp_wb.store.run import load_model, open_run

HOW = dict(num_inference_steps=2, batch_size=8, quiet=True)


@pytest.fixture
def runs(runs_folder):
    for name in ("digits-base", "digits-dmp"): shutil.copytree(assets_folder() / name, runs_folder / f"my-{name}")
    return runs_folder


@pytest.fixture
def drawn_now(monkeypatch):
    "The numbers of the images that the sampler is asked for, in a list that grows."
    asked, finish = [], room._Walk.finish

    def counting(walk, numbers, **more):
        asked.extend(numbers)
        return finish(walk, numbers, **more)
    monkeypatch.setattr(room._Walk, "finish", counting)
    return asked


def kept_files(run): return sorted(p for p in (run / "samples").glob("drawn-*/*.safetensors"))


def test_a_second_drawing_draws_nothing_and_gives_the_same_bits(runs, drawn_now):
    plain = draw("my-digits-dmp", 20, **HOW)
    assert not (runs / "my-digits-dmp" / "samples").exists()
    first = draw("my-digits-dmp", 20, keep=True, **HOW)
    assert [p.name for p in kept_files(runs / "my-digits-dmp")] == ["000000.safetensors", "000008.safetensors",
                                                                    "000016.safetensors"]
    del drawn_now[:]
    again = draw("my-digits-dmp", 20, keep=True, **HOW)
    assert drawn_now == [] and torch.equal(again.labels, first.labels)
    assert torch.equal(again.images, first.images) and torch.equal(first.images, plain.images)


def test_the_images_are_those_that_sample_draws_and_each_step_is_told(runs):
    model, ticks = load_model("my-digits-dmp"), []
    plain = wb.sample(model, 20, torch.arange(20) % 10, config="fast", **HOW)
    drawn = draw("my-digits-dmp", 20, keep=True, tick=ticks.append, **HOW).images
    assert torch.equal(drawn, plain) and ticks == [4, 4, 4, 4, 2, 2]
    del ticks[:]
    draw("my-digits-dmp", 20, keep=True, tick=ticks.append, **HOW)
    assert ticks == [8, 8, 4]


def test_a_drawing_that_was_cut_off_goes_on(runs, drawn_now, monkeypatch):
    counting = room._Walk.finish

    def torn(walk, numbers, **more):
        if numbers.start == 16: raise KeyboardInterrupt
        return counting(walk, numbers, **more)
    with monkeypatch.context() as m:
        m.setattr(room._Walk, "finish", torn)
        with pytest.raises(KeyboardInterrupt): draw("my-digits-base", 20, keep=True, **HOW)
    del drawn_now[:]
    whole = draw("my-digits-base", 20, keep=True, **HOW)
    assert drawn_now == [16, 17, 18, 19] and torch.equal(whole.images, draw("my-digits-base", 20, **HOW).images)


@pytest.mark.parametrize("change", [
    {"num_inference_steps": 3}, {"sampler": "ddim"}, {"guidance_scale": 2.0}, {"seed": 1}, {"num_images": 19},
    {"batch_size": 5}, {"dtype": "bfloat16"}, {"schedule": "cosine"}, {"guidance_interval": [0, 500]},
    {"guidance_channels": 1}],
    ids=lambda change: next(iter(change)))
def test_another_setting_is_drawn_anew(runs, drawn_now, change):
    draw("my-digits-base", 20, keep=True, **HOW)
    del drawn_now[:]
    settings = HOW | {"num_images": 20} | change
    draw("my-digits-base", keep=True, **settings)
    assert len(drawn_now) == settings["num_images"]
    draw("my-digits-base", 20, keep=True, **HOW)   # those of before are there still
    assert len(drawn_now) == settings["num_images"]


def last_value_moved(model):
    with torch.no_grad(): next(p for p in model.parameters() if p.numel() > 256).flatten()[-1] += 1e-3
    return model


def other_config(model):
    model.register_to_config(mlp_ratio=3.0)
    return model


@pytest.mark.parametrize("change", [last_value_moved, other_config, lambda model: model.bfloat16(),
                                    lambda model: load_model("digits-base")],
                         ids=["weights", "config", "dtype", "no patch"])
def test_another_model_is_drawn_anew(runs, drawn_now, change):
    draw("my-digits-dmp", 8, keep=True, **HOW)
    del drawn_now[:]
    draw("my-digits-dmp", 8, keep=True, backbone=change(load_model("my-digits-dmp")), **HOW)
    assert drawn_now == list(range(8))


def test_other_versions_and_labels_are_drawn_anew(runs, drawn_now, monkeypatch):
    draw("my-digits-base", 8, keep=True, **HOW)
    for name, value in (("version", lambda package: "0.0"),
                        ("balanced_labels", lambda n, classes: torch.arange(n) % 3), ("DRAWN_FORMAT", 0)):
        del drawn_now[:]
        with monkeypatch.context() as m:
            m.setattr(room, name, value)
            draw("my-digits-base", 8, keep=True, **HOW)
        assert drawn_now == list(range(8)), name


def torn(file): file.write_bytes(file.read_bytes()[:-9])
def too_few(file): save_file({"images": load_file(file)["images"][1:]}, file)
def not_finite(file): save_file({"images": load_file(file)["images"].fill_(torch.nan)}, file)
def nameless(file): save_file({"pictures": load_file(file)["images"]}, file)
def other_plan(file):
    plan = file.with_name("drawn.json")
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"weights": "others"}))
def no_plan(file): file.with_name("drawn.json").unlink()


@pytest.mark.parametrize("harm", [torn, too_few, not_finite, nameless, other_plan, no_plan])
def test_what_is_damaged_is_drawn_anew_and_mended(runs, drawn_now, harm):
    whole = draw("my-digits-base", 8, keep=True, **HOW)
    harm(kept_files(runs / "my-digits-base")[0])
    del drawn_now[:]
    assert torch.equal(draw("my-digits-base", 8, keep=True, **HOW).images, whole.images) and len(drawn_now) == 8
    assert torch.equal(draw("my-digits-base", 8, keep=True, **HOW).images, whole.images) and len(drawn_now) == 8


def test_where_nothing_can_be_kept_it_is_said_once_and_the_images_are_there(runs):
    (runs / "my-digits-base" / "samples").write_text("no folder")
    with pytest.warns(UserWarning, match="samples cannot be kept in .*my-digits-base/samples/drawn-") as said:
        found = draw("my-digits-base", 20, keep=True, **HOW)
    assert sum("cannot be kept" in str(w.message) for w in said) == 1
    assert torch.equal(found.images, draw("my-digits-base", 20, **HOW).images)


def test_a_run_that_ships_has_its_samples_in_the_runs_folder(runs_folder, drawn_now):
    before = {p for p in assets_folder().rglob("*")}
    draw("digits-dmp", 8, keep=True, **HOW)
    del drawn_now[:]
    draw("digits-dmp", 8, keep=True, **HOW)
    assert drawn_now == [] and len(kept_files(runs_folder / "digits-dmp")) == 1
    assert {p for p in assets_folder().rglob("*")} == before


def test_a_second_look_draws_none_and_fresh_ones_keep_none(runs, drawn_now):
    c = tables.open_compared(["my-digits-base", "my-digits-dmp"])
    how = dict(num_images=12, num_loss_images=0, num_inference_steps=2)
    first = compare.look_at(c, **how, keep=False)
    assert not kept_files(runs / "my-digits-base") and len(drawn_now) == 24
    compare.look_at(c, **how)
    assert len(drawn_now) == 48
    again = compare.look_at(c, **how)
    assert len(drawn_now) == 48 and not c.notes and list(again.drawn) == ["my-digits-base", "my-digits-dmp"]
    assert all(torch.equal(again.drawn[k].images, first.drawn[k].images) for k in first.drawn)
    compare.look_at(c, **how, keep=False)
    assert len(drawn_now) == 72


def test_the_progress_of_a_look_is_by_image_and_ends_whole(runs, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, unit, **more): self.n, self.total, self.unit, self.words = 0, total, unit, []
        def update(self, n): self.n += n
        def set_postfix_str(self, words): self.words.append(words)
        def __enter__(self): return self
        def __exit__(self, *_): bars.append(self)
    monkeypatch.setattr(compare, "progress", lambda **more: Bar(**more))
    shutil.rmtree(runs / "my-digits-dmp" / "patch")
    c = tables.open_compared(["my-digits-base", "my-digits-dmp", "digits-dmp"])
    compare.look_at(c, 12, 16, num_inference_steps=2)
    compare.look_at(c, 0, 0)
    assert [(b.n, b.total, b.unit) for b in bars] == [(84, 84, "img"), (3, 3, "run")]
    assert bars[0].words == ["my-digits-base", "my-digits-dmp", "digits-dmp"] and "my-digits-dmp" in c.notes[0]


@pytest.fixture
def two_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_models_are_looked_at_side_by_side_and_show_the_same(runs, two_cores, monkeypatch):
    shutil.rmtree(runs / "my-digits-dmp" / "patch")   # a run that can give nothing
    c = tables.open_compared(["digits-base", "my-digits-dmp", "my-digits-base", "digits-dmp"])
    how, places, both = dict(num_images=12, num_loss_images=16, num_inference_steps=2, keep=False), set(), Barrier(2)
    drawing = compare.draw

    def meeting(run, *args, **more):   # the first does not go on before the second has come
        places.add((get_ident(), torch.get_num_threads()))
        if run.name.endswith("base"): both.wait(timeout=60)
        return drawing(run, *args, **more)
    monkeypatch.setattr(compare, "draw", meeting)
    beside = compare.look_at(c, **how)
    assert torch.get_num_threads() == 2 and {cores for _, cores in places} == {1} and len(places) == 2
    assert get_ident() not in {thread for thread, _ in places} and "no samples, gates or masks" in c.notes[0]
    assert list(beside.drawn) == list(beside.mse) == ["digits-base", "my-digits-base", "digits-dmp"]
    monkeypatch.setattr(compare, "draw", drawing)
    monkeypatch.setattr(compare, "_beside_others", lambda *_: False)
    alone = compare.look_at(c, **how)
    assert all(torch.equal(alone.drawn[k].images, beside.drawn[k].images) for k in alone.drawn)
    assert all(torch.equal(alone.mse[k], beside.mse[k]) for k in alone.mse) and list(beside.gates) == ["digits-dmp"]


def test_a_model_that_is_large_or_needs_a_vae_is_looked_at_alone(monkeypatch):
    model, exp = load_model("digits-base", device="cpu"), open_run("digits-base").experiment
    assert compare._beside_others(model, exp)
    latents = dataclasses.replace(exp, data=dataclasses.replace(exp.data, vae="some/vae"))
    assert not compare._beside_others(model, latents)
    monkeypatch.setattr(compare, "LARGE", 1000)
    assert not compare._beside_others(model, exp)


def test_the_usual_extractor_follows_from_the_data(monkeypatch):
    usual = compare.usual_extractor
    monkeypatch.setattr(extractors, "inception_weights", lambda: None)
    assert usual((1, 28, 28), "fashion-mnist") == usual((1, 28, 28), DataConfig(name="fashion-mnist")) == "fashion"
    assert usual((1, 28, 28), "fashion-faded") == "fashion"
    assert usual((1, 28, 28), "mnist") == usual((1, 28, 28)) == usual((3, 32, 32), "fashion-mnist") == "inception"
    assert usual((1, 8, 8)) == usual((1, 8, 8), "some/folder") == usual((1, 8, 8), "digits-slanted") == "digits"


class ByBrightness(torch.nn.Module):
    "Logits of two classes: dark and bright."
    def forward(self, images):
        mean = images.flatten(1).mean(1)
        return {"features": torch.stack([mean, mean.abs().sqrt()], 1), "logits": torch.stack([-mean, mean], 1)}


def test_a_classifier_says_which_share_of_the_samples_it_reads_as_asked():
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 10
    clothes = Drawn(torch.rand(120, 1, 28, 28, generator=g) * 2 - 1, labels)
    real = torch.rand(150, 1, 28, 28, generator=g) * 2 - 1
    found = compare.paired_distances({"a": clothes}, real, "fashion", rounds=2)["a"]
    assert found["accuracy"] == pytest.approx(accuracy_of(fashion_classifier(), clothes.images, labels))
    both = ("features", "logits")
    made = lambda: ModuleFeatures(ByBrightness(), both)
    registries.register_extractor("brightness", made, classifies="dark-or-bright")
    registries.register_extractor("unnamed", made)
    try:
        bright = torch.arange(120) % 2
        pair = Drawn(torch.rand(120, 1, 4, 4, generator=g) * (bright * 2 - 1).view(-1, 1, 1, 1), bright)
        assert compare.usual_extractor((1, 4, 4), "dark-or-bright") == "brightness"
        measure = lambda name: compare.paired_distances({"a": pair}, real[..., :4, :4], name, rounds=2)["a"]
        assert measure("brightness")["accuracy"] == 1 and "accuracy" not in measure("unnamed")
    finally:
        for name in ("brightness", "unnamed"): del registries.EXTRACTORS[name]
    with pytest.raises(BadInput, match="classifies has 3 for extractor x"):
        registries.register_extractor("x", ByBrightness, classifies=[3])


def test_runs_are_opened_for_a_comparison_before_torch_is_there(runs):
    code = ("import sys; from dmp_wb.look.tables import open_compared, differences_table, glance_table; "
            "c = open_compared(['my-digits-base', 'my-digits-dmp']); differences_table(c), glance_table(c); "
            "assert len(c.runs) == 2 and not c.notes; sys.exit('torch' in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_legend_of_many_runs_stands_beside_the_curves(recwarn):
    curve = {"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0]}
    for count, beside in ((2, 0), (8, 1), (20, 1)):
        figure = viz.training_curves({f"{i:02d}-a-run-with-a-name": curve for i in range(count)}, "loss")
        figure.savefig(io.BytesIO(), format="png")
        ax, = figure.axes
        assert len(figure.legends) == beside and (ax.get_legend() is None) == bool(beside)
        assert ax.get_position().height > 0.6 and ax.get_window_extent().width > 400
    assert not [w for w in recwarn if "constrained_layout" in str(w.message)]
