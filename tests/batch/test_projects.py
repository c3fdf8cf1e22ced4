"""Experiments that fit a folder, as dmp-wb new --data writes them."""
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from dmp_wb import cli
from dmp_wb.batch.projects import fit_experiments, fitted, Found, look_at_data, new_project
from dmp_wb.config import load_experiment
from dmp_wb.core.errors import BadInput
from dmp_wb.store.listing import run_folder


def images(root, count=6, size=(40, 28), mode="L", classes=2):
    for i in range(count):
        file = root / (f"class {i % classes}" if classes else "") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*size[::-1], 3), (i, 50 * (mode == "RGB"), i), np.uint8)).convert(mode).save(file)
    return root


def test_a_folder_is_looked_at(tmp_path):
    assert look_at_data(images(tmp_path / "grey")) == Found(6, ["class 0", "class 1"], 28, 1)
    assert look_at_data(images(tmp_path / "plain", 3, (70, 90), "RGB", 0)) == Found(3, [], 70, 3)
    mixed = images(tmp_path / "mixed", 4)
    Image.new("L", (28, 28)).save(mixed / "loose.png")
    assert look_at_data(mixed) == Found(5, [], 28, 1)
    assert look_at_data("digits").fixed and look_at_data("digits").side == 8


@pytest.mark.parametrize("side,size,patch", [(3, 3, 1), (8, 8, 2), (28, 28, 4), (30, 30, 5), (64, 64, 8),
                                             (1000, 64, 8), (50, 48, 8)])
def test_a_model_fits_the_side_of_the_images(side, size, patch):
    made = fitted(Found(1000, [], side, 3))
    assert (made.size, made.patch_size) == (size, patch)
    assert size % patch == 0 and made.hidden_size % 4 == 0


@pytest.mark.parametrize("count", [2, 3, 70, 10**6])
def test_batch_and_steps_fit_the_number_of_images(count):
    made = fitted(Found(count, [], 8, 1))
    assert 2 <= made.batch_size <= min(64, count) and 1000 <= made.steps <= 12000 and made.patch_steps >= 500


@pytest.mark.parametrize("count,share", [(70, None), (200, 0.1), (5000, 0.05)])
def test_some_images_are_held_out_of_a_folder_that_is_large_enough(count, share, tmp_path, monkeypatch):
    folder = images(tmp_path / "photos")
    monkeypatch.setattr("dmp_wb.batch.projects.look_at_data", lambda data: Found(count, [], 8, 1))
    for exp in map(load_experiment, fit_experiments(str(folder), tmp_path)):
        assert exp.data.validation == share and exp.train.batch_size < count * (1 - (share or 0))
        assert exp.train.keep_best == ("validation_loss" if share and exp.base is None else None)


def test_the_two_experiments_load_and_name_the_folder_as_the_project_does(tmp_path):
    folder = images(tmp_path / "my Photos")
    base, patch = fit_experiments(str(folder), tmp_path)
    assert [f.name for f in (base, patch)] == ["my-photos-pretrain.yaml", "my-photos-dmp.yaml"]
    exp, on_it = load_experiment(base), load_experiment(patch)
    assert exp.data.name == on_it.data.name == "my Photos" and (exp.data.size, exp.data.channels) == (28, 1)
    assert exp.model.sample_size is exp.model.num_classes is None and on_it.base == exp.name
    assert (on_it.schedule, on_it.objective) == (exp.schedule, exp.objective) and "dmp" in on_it.methods
    fit_experiments(str(folder), tmp_path)   # once more says the same
    base.write_text("# mine\n")
    with pytest.raises(BadInput, match="is there already, and says something else: expected another --name"):
        fit_experiments(str(folder), tmp_path)


def test_experiments_of_an_archive_are_called_as_what_was_packed(tmp_path):
    shutil.make_archive(str(tmp_path / "photos"), "zip", images(tmp_path / "photos"))
    base, _ = fit_experiments(str(tmp_path / "photos.zip"), tmp_path)
    exp = load_experiment(base)
    assert base.name == "photos-pretrain.yaml" and exp.data.name == "photos.zip" and exp.data.size == 28


def test_new_says_the_next_commands_and_refuses_what_is_no_data(tmp_path, monkeypatch, capsys):
    def new(*words):
        monkeypatch.setattr("sys.argv", ["dmp-wb", "new", *words])
        with pytest.raises(SystemExit) as e: cli.main()
        return e.value.code, capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "photos")
    (tmp_path / "empty").mkdir()
    status, said = new("--data", "photos")
    assert status == 0 and "dmp-wb train photos-pretrain" in said.out and "dmp-wb train photos-dmp" in said.out
    assert "dmp-wb new . --add" in said.out   # there are no run notebooks here yet
    assert sorted(os.listdir(tmp_path / "nbs" / "experiments")) == ["photos-dmp.yaml", "photos-pretrain.yaml"]
    status, said = new("work", "--data", "photos", "--name", "mine")
    assert status == 0 and "cd work" in said.out and "nbs/experiments/mine-dmp.yaml" in said.out
    assert "--add" not in said.out
    for words, why in ((["--data", "nosuch"], "there is no such folder"), (["--data", "empty"], "holds no images"),
                       ([], "FOLDER is not given"), (["--add"], "FOLDER is not given"),
                       (["--data", "photos", "--add"], "--add is given without FOLDER"),
                       (["--data", "photos", "--name", "a/b"], "--name is 'a/b'")):
        status, said = new(*words)
        errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(errors) == 1 and why in errors[0], words
    with pytest.raises(BadInput, match="run photos-pretrain is not there yet: .*`dmp-wb train photos-pretrain`"):
        run_folder("photos-pretrain")   # the base of the patch, which is trained first
    assert load_experiment(tmp_path / "work/nbs/experiments/mine-dmp.yaml").data.name == str(tmp_path / "photos")
    assert new_project(tmp_path / "work", add=True) == ([], [])


@pytest.mark.parametrize("words", [["--data", "nowhere"], ["--data", "photos", "--name", "two words"]])
def test_new_makes_no_project_for_data_that_cannot_be_trained_on(words, tmp_path, monkeypatch):
    images(tmp_path / "photos", 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["dmp-wb", "new", "mine", *words])
    with pytest.raises(SystemExit) as e: cli.main()
    assert e.value.code == 2
    assert not (tmp_path / "mine").exists()   # so that the same command, put right, is not refused


def test_new_in_a_folder_of_a_project_names_that_project(tmp_path, monkeypatch, capsys):
    images(tmp_path / "photos", 4, classes=1)
    (tmp_path / "nbs" / "experiments").mkdir(parents=True)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    monkeypatch.setattr("sys.argv", ["dmp-wb", "new", "--data", "../photos"])
    with pytest.raises(SystemExit) as e: cli.main()
    assert not e.value.code and "dmp-wb new .. --add " in capsys.readouterr().out
    file = tmp_path / "nbs" / "experiments" / "photos-pretrain.yaml"
    assert "4 images, 1 class. " in file.read_text()
