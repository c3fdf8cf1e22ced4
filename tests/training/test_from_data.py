"""Sizes of a model that come from its data, a base that is named as a run, and runs that were moved."""
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import dmp_wb as wb
from dmp_wb.config import load_experiment, to_yaml
from dmp_wb.core.errors import BadInput
from dmp_wb.core.settings import DataConfig, ModelConfig
from dmp_wb.data.cache import write_cache
from dmp_wb.data.load import sizes_from
from dmp_wb.data.sources import digits, ImageData, Source
from dmp_wb.look.sides import class_names, look_at
from dmp_wb.store.listing import places_of, read_experiment
from dmp_wb.store.run import open_run

TINY = ["model.patch_size=4", "model.hidden_size=16", "model.num_layers=1", "model.num_attention_heads=2",
        "model.learn_sigma=false"]
RUN = ["train.batch_size=8", "train.steps=2", "train.log_every=1", "train.log_with=null", "train.checkpoint_every=1"]
DMP = ["methods.dmp.num_prompts=2"]


def train(*words, experiment=None, **where):
    return wb.train(experiment or wb.Experiment(), [*RUN, *words], **where)


def sizes(run):
    model = run.experiment.model
    return model.sample_size, model.in_channels, model.num_classes


@pytest.fixture
def photos(tmp_path):
    for i in range(9):
        file = tmp_path / "photos" / "abc"[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 24, 3), 20 * i, np.uint8)).save(file)
    return tmp_path / "photos"


def test_sizes_come_from_the_data_and_stand_in_the_config(photos, runs_folder):
    folder = [f"data.name={photos}", "data.size=12"]
    run = train(*TINY, *folder, "name=a")
    assert sizes(run) == (12, 3, 3) and wb.load_model(run.folder, device="cpu").config.num_classes == 3
    again = train(*TINY, *folder, "name=a", "train.steps=3")   # goes on, though the experiment says null
    assert again.steps_done == 3 and sizes(again) == (12, 3, 3)
    assert sizes(train(*TINY, *folder, "name=b", "data.conditional=false")) == (12, 3, None)
    assert sizes(train(*TINY, "name=c")) == (8, 1, 10)


def test_sizes_come_from_a_latent_cache(photos, runs_folder, tmp_path):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                  block_out_channels=[4, 4], norm_num_groups=2, sample_size=16).save_pretrained(tmp_path / "vae")
    write_cache(DataConfig(name=str(photos), size=16, vae=str(tmp_path / "vae"), num_workers=0), tmp_path / "latents")
    run = train(*TINY, f"data.name={tmp_path / 'latents'}", "name=latents")
    assert sizes(run) == (8, 4, 3)


def test_a_run_of_before_goes_on_with_the_classes_it_had(runs_folder):
    run = train(*TINY, "name=old")
    text = (run.folder / "config.yaml").read_text()
    shutil.rmtree(run.folder)
    run.folder.mkdir()
    (run.folder / "config.yaml").write_text(text.replace("num_classes: 10", "num_classes: null"))   # without classes
    assert sizes(train(*TINY, "name=old")) == (8, 1, None)
    assert wb.load_model(run.folder, device="cpu").config.num_classes is None


def test_what_data_cannot_tell_is_one_line(runs_folder):
    class Unknown(Source): pass
    oblong = ImageData(torch.zeros(4, 1, 8, 6), None, [])
    assert sizes_from(oblong, "x")["sample_size"] == [8, 6]
    with pytest.raises(BadInput, match=r"data 'x' do not say their shape: expected two numbers, or data with a shape"):
        sizes_from(Unknown(), "x")
    assert sizes_from(digits(), "digits") == {"sample_size": 8, "in_channels": 1, "num_classes": 10}
    with pytest.raises(BadInput, match="model.patch_size is missing"): ModelConfig().check()
    with pytest.raises(BadInput, match="leave model.num_classes null, it then comes from the data"):
        train(*TINY, "model.num_classes=7", "name=wrong")


def test_a_base_is_named_as_a_run(runs_folder, tmp_path, monkeypatch):
    base = train(*TINY, "name=sweep/base")
    for n, name in enumerate(("sweep/base", "runs/sweep/base", str(base.folder))):
        monkeypatch.chdir(runs_folder.parent if n else tmp_path)
        patch = train(f"base={name}", *DMP, "name=patch")   # the same experiment each time
        assert patch.experiment.base == str(base.folder)
    (tmp_path / "sweep" / "base").mkdir(parents=True)   # a folder of images, say, is no model
    monkeypatch.chdir(tmp_path)
    assert train("base=sweep/base", *DMP, "name=patch").finished
    shipped = load_experiment("digits-dmp", RUN)
    assert train("name=on-shipped", experiment=shipped).experiment.base == "digits-base"
    with pytest.raises(BadInput, match="nosuch"): train("base=nosuch", *DMP, "name=none")


def test_a_run_that_was_moved_finds_base_and_data_beside_itself(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("DMP_WB_RUNS", str(tmp_path / "work" / "runs"))
    data = [f"data.name={photos}", "data.size=8"]
    train(*TINY, *data, "name=base")
    patch = train("base=base", *DMP, *data, "name=patch")
    here = wb.load_model(patch.folder, device="cpu").state_dict()
    (tmp_path / "sent").mkdir()
    for part in ("base", "patch"): shutil.move(tmp_path / "work" / "runs" / part, tmp_path / "sent" / part)
    shutil.move(photos, tmp_path / "sent" / "photos")
    moved = open_run(tmp_path / "sent" / "patch")
    assert moved.experiment.base == str(tmp_path / "sent" / "base")
    assert moved.experiment.data.name == str(tmp_path / "sent" / "photos")
    assert read_experiment(moved.folder, moved=False).data.name == str(photos)
    there = wb.load_model(moved.folder, device="cpu").state_dict()
    assert all(torch.equal(here[k], there[k]) for k in here)
    monkeypatch.chdir(tmp_path / "sent")
    longer = train("base=base", *DMP, "data.name=photos", "data.size=8", "train.steps=3", folder=moved.folder)
    assert longer.steps_done == 3   # the same experiment, at another place


def test_of_two_bases_of_one_name_the_one_with_the_weights_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("DMP_WB_RUNS", str(tmp_path))
    train(*TINY, "name=base")
    patch = train("base=base", *DMP, "name=sweep/patch")
    train(*TINY, "name=sweep/base", "seed=1")   # beside the patch, and another one
    assert wb.load_model(patch.folder, device="cpu") is not None
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(BadInput, match="was trained on other weights than"): wb.load_model(patch.folder, device="cpu")


def test_places_are_looked_at_from_near_to_far(tmp_path):
    run = tmp_path / "project" / "runs" / "a"
    for place in ("project/runs/photos", "project/data/photos", "photos"): (tmp_path / place).mkdir(parents=True)
    found = places_of(run, "/old/project/data/photos", lambda p: p.is_dir())
    assert [p.relative_to(tmp_path).as_posix() for p in found] == [
        "project/runs/photos", "project/data/photos", "photos"]
    assert places_of(run, "owner/photos", lambda p: p.is_dir()) == []   # a name on the hub
    assert places_of(run, "../../../photos", lambda p: p.is_dir()) == []
    exp = wb.Experiment(name="a", base="owner/photos", methods={"dmp": wb.DMPConfig()})
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(exp))
    assert read_experiment(run).base == "owner/photos"


def test_a_run_keeps_the_names_of_its_classes_and_refuses_data_that_call_them_otherwise(photos, runs_folder):
    words = [*TINY, f"data.name={photos}", "data.size=8", "name=a"]
    run = train(*words)
    assert run.class_names == ["a", "b", "c"] and (run.folder / "classes.json").is_file()
    (photos / "b").rename(photos / "bee")   # the numbers are the same still
    with pytest.raises(BadInput, match="class 1 of the data is 'bee': expected 'b', as .*classes.json has it") as e:
        train(*words, "train.steps=3")
    assert "\n" not in str(e.value)
    (photos / "bee").rename(photos / "b")
    assert train(*words, "train.steps=3").steps_done == 3
    shutil.move(photos, photos.parent / "elsewhere")   # explorers know the names still
    assert class_names(look_at(run.folder)) == ["a", "b", "c"]
    plain = train(*TINY, "name=plain")   # digits are called as they are numbered
    assert plain.class_names == [] and not (plain.folder / "classes.json").exists()
    (run.folder / "classes.json").unlink()   # of an older version
    shutil.move(photos.parent / "elsewhere", photos)
    assert train(*words, "train.steps=4").class_names == ["a", "b", "c"]
