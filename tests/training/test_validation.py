"""The loss on held-out images: measured the same way each time, and nothing that trains depends on it."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.core.settings import DataConfig
from dmp_wb.data.load import hold_out, load_data
from dmp_wb.data.sources import EpochOrder
from dmp_wb.look import viz
from dmp_wb.store.checkpoints import list_checkpoints, load_checkpoint, newest_checkpoint
from dmp_wb.store.listing import list_runs, runs_table
from dmp_wb.training import loop

SMALL = ["model.hidden_size=16", "model.num_layers=2", "model.num_attention_heads=2", "train.batch_size=16",
         "train.steps=8", "train.log_every=3", "train.checkpoint_every=4", "train.log_with=null",
         "train.validation_images=40", "data.validation=0.1"]


def train(folder, *words, experiment="digits-quick"): return wb.train(experiment, [*SMALL, *words], folder=folder)


def rows(run, *columns):
    return [{k: row[k] for k in ("step", *columns) if k in row}
            for row in map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())]


def state(run):
    trees = load_checkpoint(newest_checkpoint(run.folder))
    return {**trees["model"], **{f"ema.{i}": v for i, v in enumerate(trees["ema"]["shadow_params"])}}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return train(tmp_path_factory.mktemp("whole") / "run")


def test_it_is_measured_at_checkpoints_and_at_the_end(whole):
    found = rows(whole, "validation_loss", "validation_mse")
    assert [row["step"] for row in found if "validation_loss" in row] == [4, 8]
    assert [row["step"] for row in found] == [3, 4, 6, 8]   # lines of the log stay where they are
    assert whole.summary["validation_loss"] == found[-1]["validation_loss"] > 0
    assert list(whole.curve("validation_mse")["step"]) == [4, 8]
    assert [v == v for v in whole.curve("loss")["validation_loss"]] == [False, True, False, True]


def test_measuring_more_often_changes_no_weight(whole, tmp_path):
    often = train(tmp_path / "run", "train.validation_every=1", "train.validation_images=7")
    assert same(state(often), state(whole))
    assert len(often.curve("validation_loss")["step"]) == 8


NOISY = ["methods.dmp.noisy_gating=true", "optim.max_grad_norm=1"]

@pytest.mark.parametrize("experiment,extra", [("digits-quick", []), ("digits-dmp", []), ("digits-dmp", NOISY)],
                         ids=["pretrain", "dmp", "noisy"])
def test_a_run_that_was_interrupted_is_equal_to_the_bit(experiment, extra, tmp_path, monkeypatch):
    words = [*(w for w in SMALL if experiment == "digits-quick" or not w.startswith("model.")), *extra]
    run = lambda folder: wb.train(experiment, words, folder=folder)
    unbroken, broken, save = run(tmp_path / "whole"), tmp_path / "broken", loop.save
    def killed(parts): raise KeyboardInterrupt
    def save_and_die(*given):
        save(*given)
        raise KeyboardInterrupt
    for place, dies in (("held_out_losses", killed), ("save", save_and_die)):   # before and after the first checkpoint
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(loop, place, dies)
            run(broken)
    again = run(broken)
    columns = ("loss", "mse", "validation_loss", "validation_mse")
    assert rows(again, *columns) == rows(unbroken, *columns) and same(state(again), state(unbroken))


def test_noise_and_timesteps_are_those_of_any_seed(tmp_path, monkeypatch):
    seen = []
    original = loop.held_out_losses
    from dmp_wb.training import record
    def look(parts):
        seen.append(record.held_out_batch(parts, torch.arange(40)))
        return original(parts)
    monkeypatch.setattr(loop, "held_out_losses", look)
    for seed in (0, 1): train(tmp_path / str(seed), f"seed={seed}")
    for other in seen[1:]: assert all(torch.equal(seen[0][k], other[k]) for k in seen[0])
    spread = seen[0]["timesteps"].sort().values * 40 // 1000
    assert spread.tolist() == list(range(40))   # one in each part of the schedule


def test_what_is_held_out_is_not_trained_on():
    data = load_data("digits")
    kept, held = hold_out(DataConfig(validation=0.1), data)
    assert len(held.indices) == 180 and len(kept) == 1617
    assert sorted([*kept.tolist(), *held.indices.tolist()]) == list(range(1797))
    order = EpochOrder(len(kept), 100, 0, kept)
    taken = torch.cat([order(step) for step in range(40)])
    assert not set(taken.tolist()) & set(held.indices.tolist()) and set(taken.tolist()) == set(kept.tolist())
    assert hold_out(DataConfig(), data) == (None, None)


def test_another_split_is_held_out(tmp_path):
    for n, split in enumerate(("train", "test", "few")):
        for i in range(8 if split != "few" else 1):
            file = tmp_path / "photos" / {"few": "val"}.get(split, split) / "ab"[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 20 * i + n, np.uint8)).save(file)
    given = [f"data.name={tmp_path / 'photos'}", "data.size=8", "data.channels=1", "data.validation=test",
             "model.num_classes=null", "train.batch_size=4"]
    run = train(tmp_path / "run", *given)
    assert run.experiment.data.validation == "test" and run.summary["validation_loss"] > 0
    config = lambda wanted: DataConfig(name=str(tmp_path / "photos"), size=8, channels=1, validation=wanted)
    kept, held = hold_out(config("test"), load_data(config("test")))
    assert kept is None and len(held.source) == 8
    assert len(hold_out(config("val"), load_data(config("val")))[1].source) == 1
    for wanted, why in (("nosuch", "unknown data.split 'nosuch'"), (0.01, r"data.validation is 0.01, 0 of 8 images")):
        with pytest.raises(BadInput, match=why): hold_out(config(wanted), load_data(config(wanted)))


@pytest.mark.parametrize("words,why", [
    (["data.validation=1.5"], "data.validation is 1.5: expected a share between 0 and 1"),
    (["data.validation=train"], "or the name of another split than data.split, 'train'"),
    (["data.validation=all"], "data.validation is 'all'"),
    (["data.validation=null", "train.keep_best=validation_loss"],
     "train.keep_best is 'validation_loss': expected another column without data.validation"),
    (["train.keep_best=validation_loss", "train.validation_every=3"],
     "train.checkpoint_every is 4: expected a multiple of train.validation_every 3"),
    (["train.validation_every=0"], "train.validation_every is 0"),
    (["train.validation_images=0"], "train.validation_images is 0"),
    (["data.validation=0.995"], "the data set has only 9 images beside those that are held out")])
def test_what_cannot_be_is_one_line(words, why, tmp_path):
    with pytest.raises(BadInput) as e: train(tmp_path / "run", *words)
    assert why in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "run").exists()


def test_the_best_checkpoint_is_kept(tmp_path, monkeypatch):
    losses = iter([0.5, 0.2, 0.3, 0.4])
    monkeypatch.setattr(loop, "held_out_losses", lambda parts: {"validation_loss": next(losses), "validation_mse": 0.0})
    run = train(tmp_path / "run", "train.checkpoint_every=2", "train.keep_last=1", "train.keep_best=validation_loss")
    assert [p.name for p in list_checkpoints(run.folder)] == ["step-0000004", "step-0000008"]


def test_lists_and_curves_show_it(whole, runs_folder):
    import shutil
    shutil.copytree(whole.folder, runs_folder / "held")
    runs, _ = list_runs(where=["validation_loss>0"], sort="validation_loss")
    assert [r.name for r in runs] == ["held"] and "validation_loss" in runs_table(runs).splitlines()[0]
    lines = viz.training_curves({"pretrain": whole.metrics()}, "loss").axes[0].lines
    assert len(lines) == 3 and list(lines[2].get_xdata()) == [4, 8]
    assert lines[2].get_label() == "pre-training, held out"


def test_two_processes_measure_what_one_does(whole, tmp_path):
    two = wb.launch("digits-quick", SMALL, num_processes=2, folder=tmp_path / "two")
    found = [run.curve("validation_loss")["validation_loss"] for run in (whole, two)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_latents_and_label_free_data_are_measured(tmp_path):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    AutoencoderKL(down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"], in_channels=1,
                  out_channels=1, block_out_channels=[4], norm_num_groups=2,
                  sample_size=8).save_pretrained(tmp_path / "vae")
    free = ["model.in_channels=null", "model.sample_size=null", "model.num_classes=null"]
    run = train(tmp_path / "run", *free, f"data.vae={tmp_path / 'vae'}", "data.conditional=false")
    assert run.summary["validation_loss"] > 0 and run.experiment.model.in_channels == 4
