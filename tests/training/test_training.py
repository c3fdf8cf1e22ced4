import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

import dmp_wb as wb
from dmp_wb.config import TrainConfig
from dmp_wb.diffusion import objectives
from dmp_wb.training import batches
from dmp_wb.training import loop
from dmp_wb.training import record
from dmp_wb.training import setup
from dmp_wb.store.checkpoints import (
    join_tensors, list_checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint, split_tensors,
)
from dmp_wb.store.run import Run
from dmp_wb.core.errors import BadInput, MissingFile
from dmp_wb.data.load import load_data
from dmp_wb.data.sources import EpochOrder
from dmp_wb.methods.patches import PATCH_NAME
from dmp_wb.training.batches import draw_batch, places_of
from dmp_wb.training.safety import asked_to_stop, NonFinite, Told
from dmp_wb.training.setup import make_model, param_groups
from dmp_wb.training.state import Average

SMALL = ["model.hidden_size=16", "model.num_layers=2", "model.num_attention_heads=2", "train.batch_size=16",
         "train.steps=8", "train.log_every=2", "train.checkpoint_every=3"]


def small(method="pretrain", extra=()):
    return wb.load_experiment({"pretrain": "digits-quick"}.get(method, f"digits-{method}"), [*SMALL, *extra])


def weights(run): return load_checkpoint(newest_checkpoint(run.folder))["model"]


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Killed(Exception): pass


@pytest.mark.parametrize("method", ["pretrain", "finetune", "prompt-tuning", "dmp", "dtr"])
def test_a_resumed_run_is_bit_identical(method, tmp_path, monkeypatch):
    whole = wb.train(small(method), folder=tmp_path / "whole")
    assert whole.finished and whole.summary["steps"] == 8
    from dmp_wb.training import loop
    from dmp_wb.training import record
    original, calls = record.append_row, []
    for stop_at in (2, 3):                       # two deaths: before the first checkpoint, and between two
        def die(run, row, stop_at=stop_at):
            original(run, row)
            calls.append(row["step"])
            if len(calls) == stop_at: raise Killed
        monkeypatch.setattr(loop, "append_row", die)
        calls.clear()
        with pytest.raises(Killed): wb.train(small(method), folder=tmp_path / "broken")
        assert not Run(tmp_path / "broken").finished
    monkeypatch.setattr(loop, "append_row", original)
    broken = wb.train(small(method), folder=tmp_path / "broken")
    assert broken.finished and equal(weights(whole), weights(broken))
    a, b = load_checkpoint(newest_checkpoint(whole.folder)), load_checkpoint(newest_checkpoint(broken.folder))
    assert all(torch.equal(x, y) for x, y in zip(a["ema"]["shadow_params"], b["ema"]["shadow_params"], strict=True))
    assert broken.metrics()["step"] == whole.metrics()["step"] == [2, 4, 6, 8]          # no line twice, none missing
    same = [k for k in whole.metrics() if k not in ("images_per_second", "memory_gib")]
    assert all(broken.metrics()[k] == whole.metrics()[k] for k in same) and {"loss", "lr", "grad_norm"} <= set(same)
    assert not list((broken.folder / "checkpoints").glob(".*"))


def test_killed_by_the_system_and_resumed(tmp_path):
    command = [sys.executable, "-m", "dmp_wb.training", "digits-quick", *SMALL, "train.steps=60",
               "train.checkpoint_every=1", "train.keep_last=3"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--folder", str(tmp_path / "killed")], env=env, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    while len(list_checkpoints(tmp_path / "killed")) < 2:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Run(tmp_path / "killed").finished
    subprocess.run([*command, "--folder", str(tmp_path / "killed")], env=env, check=True, capture_output=True)
    subprocess.run([*command, "--folder", str(tmp_path / "whole")], env=env, check=True, capture_output=True)
    assert equal(weights(Run(tmp_path / "killed")), weights(Run(tmp_path / "whole")))
    assert Run(tmp_path / "killed").metrics()["step"] == Run(tmp_path / "whole").metrics()["step"]


def test_accumulation_is_one_big_batch(tmp_path):
    one = wb.train(small(extra=["train.mixed_precision=no"]), folder=tmp_path / "one")
    four = wb.train(small(extra=["train.gradient_accumulation_steps=4"]), folder=tmp_path / "four")
    assert torch.allclose(torch.tensor(one.metrics()["loss"]), torch.tensor(four.metrics()["loss"]), rtol=1e-4)
    assert torch.allclose(torch.tensor(one.metrics()["grad_norm"]), torch.tensor(four.metrics()["grad_norm"]),
                          rtol=1e-3)


@pytest.mark.parametrize("experiment,extra", [("digits-quick", []), ("digits-dmp", []),
                                              ("digits-dtr", ["multitask.method=uw", "multitask.k=4"]),
                                              ("digits-quick", ["multitask.method=PCGrad", "multitask.k=4"])])
def test_two_processes_see_what_one_sees(experiment, extra, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    overrides = [*SMALL, "train.steps=4", *extra]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-m", "dmp_wb.training", experiment, *overrides,
              "--folder", str(tmp_path / "two")]
    launch[3:3] = ["--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run(launch, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "on 2 × cpu" in done.stdout and done.stdout.count("finished:") == 1
    one, two = wb.train(experiment, overrides, folder=tmp_path / "one"), Run(tmp_path / "two")
    for key in ("mse", "loss", "grad_norm"):   # the balance loss is that of each process's share
        assert torch.allclose(torch.tensor(one.metrics()[key]), torch.tensor(two.metrics()[key]),
                              rtol=1e-2 if experiment == "digits-dmp" else 1e-3), key


def test_dmp_leaves_the_backbone_alone_and_keeps_state_for_the_patch_only(tmp_path):
    base = {k: v.clone() for k, v in wb.load_model("digits-base").state_dict().items()}
    run = wb.train(small("dmp"), folder=tmp_path / "dmp")
    state = load_checkpoint(newest_checkpoint(run.folder))
    assert set(state["model"]) == {f"{PATCH_NAME}.default.prompts", f"{PATCH_NAME}.default.gate.weight",
                                   f"{PATCH_NAME}.default.gate.bias"}
    assert len(state["optimizer"]["state"]) == 3
    prompts, gate = state["optimizer"]["param_groups"]
    assert gate["lr"] == pytest.approx(10 * prompts["lr"])
    model = wb.load_model(run.folder)
    assert (equal({k: v for k, v in model.state_dict().items() if not k.startswith(f"{PATCH_NAME}.")}, base)
            and wb.get_patch(model).prompts.abs().sum() > 0)
    assert ({f.name for f in (run.folder / "patch").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
            and not (run.folder / "model").exists())
    assert PATCH_NAME not in wb.load_model(run.folder, patched=False)._modules
    assert run.summary["trained_parameters"] == sum(p.numel() for p in wb.get_patch(model).parameters())
    assert "balance" in run.metrics()


def test_a_routed_run_loads_routed(tmp_path):
    whole = wb.train(small("dtr", extra=["routing.sharing_ratio=0.5"]), folder=tmp_path / "whole")
    plain = wb.train(small(), folder=tmp_path / "plain")
    assert not equal(weights(whole), weights(plain)) and weights(whole).keys() == weights(plain).keys()
    model = wb.load_model(whole.folder)
    assert wb.get_router(model).config.sharing_ratio == 0.5 and wb.get_router(wb.load_model(plain.folder)) is None
    # a patch on a routed base: both come back
    patched = wb.train(small("dmp", extra=[f"base={whole.folder}"]), folder=tmp_path / "patched")
    both = wb.load_model(patched.folder)
    assert wb.get_router(both) is not None and wb.get_patch(both).prompts.abs().sum() > 0
    with pytest.raises(wb.BadInput, match="has the method dtr already, which stays on it: expected a base without it"):
        wb.train(small("dmp", extra=[f"base={whole.folder}", "routing.sharing_ratio=0.8"]), folder=tmp_path / "again")
    routed_patch = wb.train(small("dmp", extra=["routing.sharing_ratio=0.9"]), folder=tmp_path / "routed-patch")
    assert (wb.get_router(wb.load_model(routed_patch.folder)) is not None
            and wb.get_router(wb.load_model(routed_patch.folder, patched=False)) is None)


@pytest.mark.parametrize("target", ["sample", "v_prediction", "flow_prediction"])
def test_other_targets_train_and_sample(target, tmp_path):
    run = wb.train(small(extra=[f"objective.prediction_type={target}", "objective.weighting=min-snr", "train.steps=60",
                                "train.log_every=20", "optim.lr=5e-3"]), folder=tmp_path / target)
    loss = run.metrics()["loss"]
    assert loss[-1] < loss[0]
    model, sampler = wb.load_model(run.folder), "flow-euler" if target == "flow_prediction" else "ddim"
    images = wb.sample(model, 4, sampler=sampler, num_inference_steps=4, prediction_type=target, quiet=True)
    assert images.isfinite().all() and images.std() > 0.1
    with pytest.raises(BadInput, match="expected flow-euler with flow_prediction"):
        wb.sample(model, 4, sampler="ddim" if target == "flow_prediction" else "flow-euler", prediction_type=target)
    with pytest.raises(BadInput, match=f"objective.prediction_type is epsilon: expected {target}, which base"):
        wb.train(small("dmp", extra=[f"base={run.folder}"]), folder=tmp_path / "dmp")


@pytest.mark.parametrize("method,clusters", [("uw", "log-snr"), ("PCGrad", "uniform")])
@pytest.mark.parametrize("base", ["pretrain", "dmp"])
def test_multitask_methods(method, clusters, base, tmp_path, monkeypatch):
    extra = [f"multitask.method={method}", f"multitask.clusters={clusters}", "multitask.k=4"]
    run = wb.train(small(base, extra=extra), folder=tmp_path / "run")
    plain = wb.train(small(base), folder=tmp_path / "plain")
    shared = weights(plain).keys()
    assert any(not torch.equal(weights(run)[k], weights(plain)[k]) for k in shared)
    extra_weights = set(weights(run)) - set(shared)
    assert extra_weights == ({"multitask.s"} if method == "uw" else set())
    if method == "uw": assert weights(run)["multitask.s"].abs().sum() > 0
    # killed between checkpoints and resumed: the same weights
    from dmp_wb.training import loop
    from dmp_wb.training import record
    original = record.append_row

    def die(run, row):
        original(run, row)
        if row["step"] == 4: raise Killed
    monkeypatch.setattr(loop, "append_row", die)
    with pytest.raises(Killed): wb.train(small(base, extra=extra), folder=tmp_path / "broken")
    monkeypatch.setattr(loop, "append_row", original)
    assert equal(weights(run), weights(wb.train(small(base, extra=extra), folder=tmp_path / "broken")))


def test_batches_are_balanced_over_intervals():
    from dmp_wb.tasks.intervals import interval_of
    from dmp_wb.tasks.weighting import make_clusters
    from dmp_wb.diffusion.objectives import make_tables
    exp, data = small(extra=["multitask.method=uw", "multitask.k=4"]), load_data("digits")
    clusters = make_clusters(exp.multitask, make_tables())
    batch = draw_batch(exp, data, EpochOrder(len(data), 16, 0), 3, 10, clusters=clusters)
    assert torch.bincount(interval_of(batch["timesteps"], clusters)).tolist() == [4, 4, 4, 4]


@pytest.mark.parametrize("extra,match", [
    (["multitask.method=pcgrad"], "unknown multitask.method 'pcgrad': did you mean 'PCGrad'"),
    (["multitask.method=uw", "multitask.k=17"], "train.batch_size is 16: expected at least multitask.k, 17"),
    (["multitask.method=PCGrad", "train.gradient_accumulation_steps=2"], "expected 1 with multitask.method PCGrad"),
    (["multitask.method=PCGrad", "train.mixed_precision=fp16"], "expected no or bf16 with"),
    (["multitask.method=uw", "multitask.clusters=nowhere.safetensors"], "no file nowhere.safetensors"),
    (["multitask.k=0"], "multitask.k is 0"),
])
def test_bad_multitask_settings(extra, match, tmp_path):
    with pytest.raises(BadInput, match=match): wb.train(small(extra=extra), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_noise_and_load_balance_in_training(tmp_path):
    extra = ["patch.noisy_gating=true", "patch.top_k=3", "patch.load_weight=0.5", "patch.depth=[0,2]",
             "patch.gate_input=condition"]
    run, again = (wb.train(small("dmp", extra=extra), folder=tmp_path / name) for name in "ab")
    assert equal(weights(run), weights(again)) and all(v > 0 for v in run.metrics()["load"])
    state = load_checkpoint(newest_checkpoint(run.folder))
    # the prompts; gate weight, bias and noise
    assert [len(g["params"]) for g in state["optimizer"]["param_groups"]] == [1, 3]
    p = wb.get_patch(wb.load_model(run.folder))
    assert p.blocks == [0, 2] and p.config.top_k == 3 and p.w_noise.abs().sum() > 0


def test_frozen_diffusers_dit_does_not_drop_labels(tmp_path):
    "Its blocks drop labels on their own in train mode; the loop drops them, once."
    from conftest import randomise, tiny_diffusers_dit
    tiny_diffusers_dit().save_pretrained(tmp_path / "dit")
    for method in ("dmp", "finetune"):
        model = make_model(wb.load_experiment(f"digits-{method}", [f"base={tmp_path / 'dit'}"]), load_data("digits"))
        if method == "dmp": assert wb.get_patch(model).training; randomise(wb.get_patch(model), 0.1)
        x = torch.randn(1, 1, 8, 8).expand(64, -1, -1, -1)
        out = model(x, timestep=torch.full((64,), 500), class_labels=torch.full((64,), 3)).sample
        assert torch.allclose(out, out[:1].expand_as(out), atol=1e-5)


def test_a_run_finds_its_base_from_any_folder_and_notices_another(tmp_path, monkeypatch):
    exp, other = small(), small(extra=["seed=5"])
    patching = wb.load_experiment("digits-dmp", ["base=pre", "train.batch_size=16", "train.steps=3"])
    monkeypatch.chdir(tmp_path)
    wb.train(exp, folder="pre")
    run = wb.train(patching, folder="patched")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    wb.load_model(tmp_path / "patched")
    assert run.experiment.base == str(tmp_path / "pre")
    shutil.rmtree(tmp_path / "pre")
    with pytest.raises(MissingFile, match=f"the base of run .*patched is gone, {tmp_path / 'pre'}: expected it there"):
        wb.load_model(tmp_path / "patched")
    wb.train(other, folder=tmp_path / "pre")
    with pytest.raises(BadInput, match="trained on other weights than"): wb.load_model(tmp_path / "patched")


def test_precision_may_change_between_runs_of_a_process(tmp_path):
    for i, precision in enumerate(("no", "bf16", "no")):
        run = wb.train(small(extra=[f"train.mixed_precision={precision}", "train.steps=2"]), folder=tmp_path / str(i))
    assert run.finished


def test_learning_rates_of_the_groups():
    exp = small("dmp", ["optim.lr=2e-4", "optim.gate_lr_scale=10"])
    model = make_model(exp, load_data("digits"))
    rest, gate = param_groups(model, exp)
    assert [p.shape for p in rest["params"]] == [wb.get_patch(model).prompts.shape] and rest["lr"] == 2e-4
    assert len(gate["params"]) == 2 and gate["lr"] == pytest.approx(2e-3)
    assert len(param_groups(make_model(small(), load_data("digits")), small())) == 1


def test_exported_weights_are_the_average(tmp_path):
    run = wb.train(small(extra=["train.ema_decay=0.5"]), folder=tmp_path / "r")
    state = load_checkpoint(newest_checkpoint(run.folder))
    exported = dict(wb.load_model(run.folder).named_parameters())
    for name, average in zip(state["model"], state["ema"]["shadow_params"], strict=True):
        assert torch.equal(exported[name], average), name
    assert any(not torch.equal(v, exported[k]) for k, v in state["model"].items())


def test_the_average_is_that_of_diffusers():
    from diffusers.training_utils import EMAModel
    g = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(5, generator=g, dtype=torch.float64)) for _ in range(3)]
    ours, theirs = Average(weights, decay=0.97), EMAModel(weights, decay=0.97, foreach=True)
    for _ in range(400):
        for p in weights: p.data += torch.randn(5, generator=g, dtype=torch.float64)
        ours.step(weights), theirs.step(weights)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(ours.shadow_params, theirs.shadow_params, strict=True))
    assert [ours.get_decay(n) for n in range(1, 500)] == [theirs.get_decay(n) for n in range(1, 500)]
    mine, other = ours.state_dict(), theirs.state_dict()
    assert {**mine, "shadow_params": 0} == {**other, "shadow_params": 0}
    again = Average(weights)
    again.load_state_dict(other)   # what checkpoints of earlier versions hold
    assert again.decay == 0.97 and again.optimization_step == 400
    assert all(torch.equal(a, b) for a, b in zip(again.shadow_params, theirs.shadow_params, strict=True))


def test_training_learns(tmp_path):
    run = wb.train("digits-quick", ["train.steps=60"], folder=tmp_path / "r")
    loss = run.metrics()["loss"]
    assert loss[-1] < 0.6 * loss[0]
    assert {"step", "loss", "mse", "vb", "lr", "grad_norm", "images_per_second"} <= set(run.metrics())


def test_learned_variance_trains(tmp_path):
    run = wb.train(small(extra=["model.learn_sigma=true", "objective.weighting=min-snr"]), folder=tmp_path / "r")
    assert all(v > 0 for v in run.metrics()["vb"]) and wb.load_model(run.folder).learn_sigma


def test_mixed_precision(tmp_path):
    run = wb.train(small("dmp", ["train.mixed_precision=bf16", "train.gradient_checkpointing=true"]),
                   folder=tmp_path / "r")
    assert (all(v == v for v in run.metrics()["loss"])
            and weights(run)[f"{PATCH_NAME}.default.prompts"].dtype == torch.float32)


# --- data order

def test_batches_are_a_function_of_the_step_and_labels_are_dropped():
    data, exp = load_data("digits"), small(extra=["train.batch_size=500", "train.label_dropout=0.2"])
    order = EpochOrder(len(data), 500, 0)
    a, b = draw_batch(exp, data, order, 7, 10), draw_batch(exp, data, EpochOrder(len(data), 500, 0), 7, 10)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["noise"], draw_batch(exp, data, order, 8, 10)["noise"])
    halves = [draw_batch(exp, data, order, 7, 10, s) for s in (slice(0, 250), slice(250, 500))]
    assert all(torch.equal(a[k], torch.cat([h[k] for h in halves])) for k in a)
    assert 0.12 < (a["class_labels"] == 10).float().mean() < 0.28
    kept = a["class_labels"] != 10
    assert torch.equal(a["class_labels"][kept], data.labels[order(7)][kept])
    assert "class_labels" not in draw_batch(exp, data, order, 7, None)
    assert a["timesteps"].min() >= 0 and a["timesteps"].max() <= 999


# --- checkpoints

def test_split_and_join():
    tree = {"a": [1, {"b": torch.ones(2)}, None],
            "state": {0: {"step": torch.tensor(3.0)}, 11: {"step": torch.tensor(4.0)}}, "s": "text", "t": (0.9, 0.99)}
    plain, tensors = split_tensors(tree)
    back = join_tensors(json.loads(json.dumps(plain)), tensors)
    assert (torch.equal(back["a"][1]["b"], torch.ones(2)) and back["state"][11]["step"] == 4 and back["s"] == "text"
            and back["t"] == [0.9, 0.99] and back["a"][2] is None)


@pytest.mark.parametrize("harm", ["truncate", "delete", "flip", "no manifest"])
def test_damaged_checkpoint_falls_back(harm, tmp_path):
    for step in (1, 2): save_checkpoint(tmp_path, step, {"model": {"w": torch.full((64,), float(step))}})
    folder = list_checkpoints(tmp_path)[-1]
    file = folder / "model.safetensors"
    if harm == "truncate": file.write_bytes(file.read_bytes()[:-1])
    elif harm == "delete": file.unlink()
    elif harm == "flip": file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    else: (folder / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="step-0000002 is damaged"):
        assert newest_checkpoint(tmp_path).name == "step-0000001"


def test_full_disk_keeps_older_checkpoints(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"model": {"w": torch.ones(3)}})
    from dmp_wb.store import checkpoints as store_checkpoints
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(store_checkpoints, "save_file", full)
    with pytest.raises(BadInput, match="No space.*older checkpoints are untouched"):
        save_checkpoint(tmp_path, 2, {"model": {"w": torch.ones(3)}})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000001"] and newest_checkpoint(tmp_path)


def test_pruning_never_leaves_only_damaged_ones(tmp_path):
    for step in (2000, 3000): save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(1)}})
    (tmp_path / "checkpoints" / "step-0003000" / "model.safetensors").unlink()
    save_checkpoint(tmp_path, 2500, {"model": {"w": torch.ones(1)}}, keep_last=1)   # resumed from 2000
    with pytest.warns(UserWarning, match="step-0003000 is damaged"):
        assert newest_checkpoint(tmp_path).name == "step-0002500"


def test_keep_last(tmp_path):
    for step in range(1, 6): save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(1)}}, keep_last=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-0000004", "step-0000005"]


@pytest.mark.parametrize("keep_last", [1, 3, 4, 8])
def test_as_many_stay_as_asked(keep_last, tmp_path):
    for step in range(1, 13):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(1)}}, keep_last)
        assert [int(p.name[-7:]) for p in list_checkpoints(tmp_path)] == list(
            range(max(1, step - keep_last + 1), step + 1))


# --- mistakes

def test_finished_run_is_left_alone_and_another_experiment_is_refused(tmp_path):
    run = wb.train(small(), folder=tmp_path / "r")
    before = {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")}
    wb.train(small(), folder=tmp_path / "r")
    assert {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")} == before
    with pytest.raises(BadInput, match="optim.lr is 0.002 there and 0.1 here"):
        wb.train(small(extra=["optim.lr=0.1"]), folder=tmp_path / "r")
    assert {p: p.stat().st_mtime_ns for p in run.folder.rglob("*")} == before


@pytest.mark.parametrize("experiment,overrides,match", [
    ("digits-quick", ["model.sample_size=16"], "1×16×16 images, but data 'digits' has 1×8×8"),
    ("digits-quick", ["model.num_classes=5"], "5 classes, but data 'digits' has 10"),
    ("digits-quick", ["train.batch_size=5000"], "train.batch_size is 5000, but the data set has only 1797"),
    ("digits-quick", ["data.name=digts"], "did you mean 'digits'"),
    ("digits-quick", ["model.hidden_size=63"], "multiple of"),
    ("digits-quick", ["train.mixed_precision=fp16"], "expected 'no' or 'bf16' on a CPU"),
    ("digits-quick", ["name=digits-base"], "ships with the package"),
    ("digits-quick", ["schedule.name=lin"], "unknown schedule 'lin'"),
    ("digits-dmp", ["name=x", "base=digits-bse"], "did you mean 'digits-base'"),
    ("digits-dmp", ["name=x", "base=nowhere/x.pt"], "no checkpoint nowhere/x.pt"),
    ("digits-dmp", ["name=x", "base=digits-dmp"], "has the method dmp already, which stays on it"),
])
def test_nothing_is_written_for_an_impossible_experiment(experiment, overrides, match, runs_folder):
    with pytest.raises(BadInput, match=match): wb.train(experiment, overrides)
    assert not runs_folder.exists()


def test_not_a_number_stops_the_run(tmp_path, monkeypatch):
    from dmp_wb.training import loop
    original = objectives.diffusion_losses
    calls = []
    def poisoned(*a, **k):
        calls.append(1)
        return {n: v * (float("nan") if len(calls) == 5 else 1) for n, v in original(*a, **k).items()}
    monkeypatch.setattr(loop, "diffusion_losses", poisoned)
    with pytest.raises(FloatingPointError, match="not finite at step 4.*step-0000003"):
        wb.train(small(), folder=tmp_path / "r")
    assert not Run(tmp_path / "r").finished


@pytest.mark.parametrize("arguments,match", [
    (["digits-pretran"], "error: unknown experiment 'digits-pretran': did you mean 'digits-pretrain'?"),
    (["digits-quick", "trian.steps=1"], "did you mean 'train.steps'?"),
    (["digits-quick", "train.steps=x"], "error: override 'train.steps=x': train.steps is 'x': expected int"),
    (["missing.yaml"], "unknown experiment 'missing.yaml'"),
    (["digits-dmp", "name=other", "base=gone.pt"], "error: no checkpoint gone.pt"),
])
def test_command_line_mistakes_are_one_line(arguments, match, runs_folder):
    done = subprocess.run([sys.executable, "-m", "dmp_wb.training", *arguments], capture_output=True, text=True)
    assert (done.returncode == 2 and match in done.stderr and "Traceback" not in done.stderr
            and len(done.stderr.strip().splitlines()) == 1)
    assert not runs_folder.exists()


def test_load_model_from_everywhere(tmp_path, inputs):
    model = wb.load_model("digits-base")
    x, t, y = inputs
    want = model(x, t, y).sample
    model.save_pretrained(tmp_path / "diffusers")
    torch.save({"ema": model.state_dict()}, tmp_path / "official.pt")
    for source, heads in ((tmp_path / "diffusers", None), (tmp_path / "official.pt", model.config.num_attention_heads)):
        assert torch.equal(wb.load_model(source, num_attention_heads=heads)(x, t, y).sample, want)
    shutil.rmtree(tmp_path / "diffusers")
    with pytest.raises(BadInput, match="unknown run"): wb.load_model(tmp_path / "diffusers")
    with pytest.raises(MissingFile, match="no checkpoint"): wb.load_model(tmp_path / "gone.safetensors")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"_class_name": "Nonesuch"}')
    with pytest.raises(BadInput, match="_class_name 'Nonesuch'"): wb.load_model(tmp_path / "odd")
    for spoil in ("truncate", "delete", "other size", "scheduler", "list"):
        folder = tmp_path / spoil
        model.save_pretrained(folder)
        file, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
        if spoil == "truncate": file.write_bytes(file.read_bytes()[:-10])
        elif spoil == "delete": file.unlink()
        elif spoil == "other size": config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 32}))
        elif spoil == "scheduler": config.write_text('{"_class_name": "DDPMScheduler"}')
        else: config.write_text("[]")
        with pytest.raises(BadInput, match=spoil) as e: wb.load_model(folder)
        assert "\n" not in str(e.value)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(BadInput, match="holds a list: expected a state dict"): wb.load_model(tmp_path / "list.pt")


def test_an_unfinished_run_is_no_model(tmp_path, monkeypatch):
    from dmp_wb.training import loop
    def die(*a): raise Killed
    monkeypatch.setattr(loop, "export", die)
    with pytest.raises(Killed): wb.train(small(), folder=tmp_path / "r")
    with pytest.raises(BadInput, match="has not finished training"): wb.load_model(tmp_path / "r")


# --- stability, signals, and one writer at a time

def poison(monkeypatch, steps, times=10**9):
    "Make the images of some steps not finite, at most so many times."
    original, left = batches.draw_batch, [times]

    def draw(exp, data, order, step, *args, **kwargs):
        batch = original(exp, data, order, step, *args, **kwargs)
        if step in steps and left[0] > 0:
            left[0] -= 1
            batch["images"] = batch["images"] * float("inf")
        return batch
    monkeypatch.setattr(batches, "draw_batch", draw)


def test_a_step_that_is_not_finite_stops_and_is_kept(tmp_path, monkeypatch):
    poison(monkeypatch, [5])
    with pytest.raises(FloatingPointError, match=r"not finite at step 5 of .*its batch and timesteps are in (\S+), the "
                       r"newest checkpoint is .*step-0000003") as e:
        wb.train(small(), folder=tmp_path / "run")
    file = tmp_path / "run" / e.value.args[0].split("are in ")[1].split(",")[0]
    from safetensors import safe_open
    with safe_open(file, "pt") as f:
        assert (set(f.keys()) == {"images", "noise", "timesteps", "class_labels"}
                and len(f.get_tensor("timesteps")) == 16 and f.metadata()["step"] == "5")
    monkeypatch.undo()
    # and the run goes on once the cause is gone
    assert equal(weights(wb.train(small(), folder=tmp_path / "run")),
                 weights(wb.train(small(), folder=tmp_path / "whole")))


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, monkeypatch):
    poison(monkeypatch, [2, 5])
    run = wb.train(small(extra=["train.on_nonfinite=skip"]), folder=tmp_path / "run")
    assert run.metrics()["skipped"] == [0, 1, 2, 2] and all(torch.isfinite(w).all() for w in weights(run).values())
    monkeypatch.undo()
    monkeypatch.setenv("DMP_WB_RUNS", str(tmp_path))
    poison(monkeypatch, range(3, 8))
    with pytest.raises(FloatingPointError, match="at step 5"):
        wb.train(small(extra=["train.on_nonfinite=skip", "train.nonfinite_limit=2"]), folder=tmp_path / "many")


@pytest.mark.parametrize("killed", [False, True])
def test_rolling_back_to_a_lower_rate(killed, tmp_path, monkeypatch):
    from dmp_wb.training import loop
    from dmp_wb.training import record
    extra = ["train.on_nonfinite=rollback", "train.log_every=1"]
    poison(monkeypatch, [4], times=2)
    if killed:   # right after the second rollback
        original = record.append_row

        def die(run, row):
            if ((tmp_path / "run" / "rollback.json").exists()
                    and json.loads((tmp_path / "run" / "rollback.json").read_text())["lr_scale"] == 0.25):
                raise Killed
            original(run, row)
        monkeypatch.setattr(loop, "append_row", die)
        with pytest.raises(Killed): wb.train(small(extra=extra), folder=tmp_path / "run")
        monkeypatch.setattr(loop, "append_row", original)
    run = wb.train(small(extra=extra), folder=tmp_path / "run")
    lr = run.metrics()["lr"]
    plain = wb.train(small(extra=["train.log_every=1"]), folder=tmp_path / "plain").metrics()["lr"]
    assert (run.metrics()["step"] == list(range(1, 9)) and lr[:3] == plain[:3]
            and lr[3:] == pytest.approx([v / 4 for v in plain[3:]]))
    poison(monkeypatch, [4])
    with pytest.raises(FloatingPointError, match="at step 4"):
        wb.train(small(extra=[*extra, "train.nonfinite_limit=3"]), folder=tmp_path / "never")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("processes", [1, 2])
def test_pre_emption_saves_and_leaves(number, processes, tmp_path):
    if processes == 2 and number == signal.SIGUSR1: pytest.skip("torchrun passes on SIGTERM alone")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings = [*SMALL, "train.steps=100000", "train.checkpoint_every=100000", "train.log_every=5"]
    command = [sys.executable, "-m", "dmp_wb.training"] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dmp_wb.training"]
    process = subprocess.Popen([*command, "digits-quick", *settings, "--folder", str(tmp_path / "run")], env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    last = Run(tmp_path / "run").metrics()["step"][-1]
    saved = load_checkpoint(newest_checkpoint(tmp_path / "run"))["step"]
    assert last <= saved < last + 5 and not Run(tmp_path / "run").finished, out[-2000:]
    if processes == 1: assert f"stopped by a signal at step {saved}" in out


def test_two_runs_cannot_write_one_folder(tmp_path):
    from dmp_wb.store.checkpoints import run_lock
    with run_lock(tmp_path / "run"), pytest.raises(
            BadInput, match=rf"is being written by process {os.getpid()} on .*expected to be the only one"):
        wb.train(small(), folder=tmp_path / "run")
    assert wb.train(small(), folder=tmp_path / "run").finished


def test_which_checkpoints_stay(tmp_path):
    run = wb.train(small(extra=["train.checkpoint_every=1", "train.log_every=1", "train.keep_last=2",
                                "train.keep_every=3", "train.keep_best=loss"]), folder=tmp_path / "run")
    from dmp_wb.store.checkpoints import best_checkpoint
    loss = run.metrics()["loss"]
    best = 1 + loss.index(min(loss))
    assert ([int(p.name[5:]) for p in list_checkpoints(run.folder)] == sorted({3, 6, 7, 8, best})
            and best_checkpoint(run.folder).name == f"step-{best:07d}")
    with pytest.raises(BadInput, match="train.keep_every is 4: expected a multiple of train.checkpoint_every 3"):
        small(extra=["train.keep_every=4"])


def test_a_full_disk(tmp_path, monkeypatch):
    from dmp_wb.core import files
    from dmp_wb.store import checkpoints as store_checkpoints
    original, calls = files.write_json, []

    def full(path, obj):
        calls.append(path)
        if len(calls) > 2: raise OSError(28, "No space left on device")
        return original(path, obj)
    monkeypatch.setattr(store_checkpoints, "write_json", full)
    with pytest.raises(BadInput, match="checkpoint of step 6 cannot be written below .*No space left on device; the "
                       "older checkpoints are untouched"):
        wb.train(small(), folder=tmp_path / "run")
    monkeypatch.undo()
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-0000003"] and not list(
        (tmp_path / "run" / "checkpoints").glob(".*"))
    assert equal(weights(wb.train(small(), folder=tmp_path / "run")),
                 weights(wb.train(small(), folder=tmp_path / "whole")))


@pytest.mark.parametrize("writer,after", [("config", 0), ("metrics", 3), ("samples", 3), ("checkpoint", 3),
                                          ("export", 8), ("summary", 8)])
def test_every_writer_on_a_full_disk_says_what_goes_on(writer, after, tmp_path, monkeypatch):
    """One line that names the file and the step to go on from, whoever writes;
    with room again the run is what it would have been."""
    from dmp_wb.core import files
    from dmp_wb.models import dit as models_dit
    exp = small(extra=[*STEADY, "train.sample_every=4", "train.sample_images=4", "train.sample_steps=2"])
    whole = wb.train(exp, folder=tmp_path / "whole")
    place = {"config": "config.yaml", "metrics": "metrics.jsonl", "samples": "step-0000004.png",
             "checkpoint": "step-0000006", "export": "", "summary": "summary.json"}[writer]
    subject, goes_on = ("the checkpoint of step 6" if writer == "checkpoint" else place,
                        f"step {after}" if after else "the beginning")
    fsync, append, save_pretrained = os.fsync, record.append_row, models_dit.DiT.save_pretrained

    def sync(fd):
        name = os.readlink(f"/proc/self/fd/{fd}")
        if writer != "export" and place in name and ("checkpoints" in name) == (writer == "checkpoint"):
            raise OSError(28, "No space left on device")
        fsync(fd)

    def row(run, values):
        if writer == "metrics" and values["step"] == 4:
            # takes no byte
            monkeypatch.setattr(files, "open_to_append", lambda path: os.open("/dev/full", os.O_WRONLY))
        append(run, values)

    def pretrained(model, folder, **more):
        if writer == "export":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_pretrained(model, folder, **more)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(loop, "append_row", row)
    monkeypatch.setattr(models_dit.DiT, "save_pretrained", pretrained)
    message = rf"(?i){subject}.*no space left on device.*once there is room, the same command goes on from {goes_on}"
    with pytest.raises(BadInput, match=message) as e: wb.train(exp, folder=tmp_path / "run")
    assert len(str(e.value).splitlines()) == 1
    monkeypatch.undo()
    run = wb.train(exp, folder=tmp_path / "run")
    assert run.finished and equal(weights(run), weights(whole)) and run.metrics()["loss"] == whole.metrics()["loss"]
    assert not list(run.folder.rglob("*.tmp"))


def test_errors_that_are_no_full_disk_stay_what_they_are(tmp_path, monkeypatch):
    def gone(*_): raise FileNotFoundError(2, "No such file or directory", "an-image.png")
    monkeypatch.setattr(loop, "append_row", gone)
    with pytest.raises(FileNotFoundError) as e: wb.train(small(), folder=tmp_path / "run")
    assert not isinstance(e.value, BadInput)


def test_killed_at_random_moments():
    """Twenty kills, in pre-training and in DMP, with one process and with two.
    `--kills 20` kills each of the four so often."""
    drill = Path(__file__).parents[2] / "tools" / "drills" / "kill_and_resume.py"
    done = subprocess.run([sys.executable, str(drill), "--kills", "5"], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("killed 5 times") == done.stdout.count("bit-identical") == 4, (
        done.stdout + done.stderr[-3000:])


def test_a_base_with_classes_learns_from_data_without_by_its_null_class(tmp_path):
    exp = small("dmp", ["data.conditional=false"])
    data = load_data(exp.data)
    labels = draw_batch(exp, data, EpochOrder(len(data), 16, 0), 0, 10)["class_labels"]
    assert labels.shape == (16,) and (labels == 10).all() and labels.dtype == torch.int64
    assert wb.train(exp, folder=tmp_path / "run").finished
    with pytest.raises(BadInput, match="data 'digits' has None: leave model.num_classes null"):
        wb.train(small("pretrain", ["data.conditional=false"]), folder=tmp_path / "other")


def test_a_pipeline_s_folder_is_a_base(tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
                       norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    assert equal(wb.load_model(tmp_path / "pipe").state_dict(), unet.state_dict())
    shutil.rmtree(tmp_path / "pipe" / "unet")
    with pytest.raises(BadInput, match="is a pipeline without a backbone: expected a folder transformer or unet"):
        wb.load_model(tmp_path / "pipe")


# --- interrupted by Ctrl-C, made longer, gone on with differently

def interrupt_at(run, step, times=1):
    "Ctrl-C in this process once a run has logged a step."
    def press():
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < step:
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
    threading.Thread(target=press, daemon=True).start()


def test_the_first_ctrl_c_saves_and_says_so_and_the_run_goes_on_to_the_bit(tmp_path, capfd):
    exp = small(extra=["train.steps=400", "train.checkpoint_every=400", "train.log_every=1"])
    interrupt_at(tmp_path / "run", 5)
    with pytest.raises(KeyboardInterrupt): wb.train(exp, folder=tmp_path / "run")
    step, said = load_checkpoint(newest_checkpoint(tmp_path / "run"))["step"], capfd.readouterr()
    assert (step >= 5 and Run(tmp_path / "run").metrics()["step"] == list(range(1, step + 1))
            and not Run(tmp_path / "run").finished)
    assert ("once more stops at once" in said.err
            and f"stopped by a signal at step {step}, with a checkpoint: run it again to go on" in said.out)
    assert equal(weights(wb.train(exp, folder=tmp_path / "run")), weights(wb.train(exp, folder=tmp_path / "whole")))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_ctrl_c_ends_at_once(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with pytest.raises(KeyboardInterrupt), asked_to_stop(say=False) as asked:
        assert not asked() and not asked.interrupted
        os.kill(os.getpid(), signal.SIGINT)
        assert asked() and asked.interrupted
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")   # torchrun hears the same Ctrl-C, and sends it on
    with asked_to_stop(say=False) as asked:
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
        assert asked.interrupted
    with asked_to_stop(say=False) as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() and not asked.interrupted


STEADY = ["optim.lr_scheduler=constant"]   # a rate that does not depend on the number of steps


def test_more_steps_make_a_finished_run_longer_as_if_it_had_been_so_from_the_start(tmp_path, capsys):
    short, long = small(extra=STEADY), small(extra=[*STEADY, "train.steps=12"])
    first = wb.train(short, folder=tmp_path / "run")
    assert first.finished and first.steps_done == 8
    run = wb.train(long, folder=tmp_path / "run")
    whole = wb.train(long, folder=tmp_path / "whole")
    assert (run.finished and run.summary["steps"] == 12 and equal(weights(run), weights(whole))
            and run.metrics()["loss"] == whole.metrics()["loss"])
    assert (run.experiment.train.steps == 12
            and "# from step 8 on, train.steps is 12; it was 8" in (run.folder / "config.yaml").read_text())
    assert json.loads((run.folder / "summary-step-0000008.json").read_text())["steps"] == 8
    capsys.readouterr()
    assert wb.train(long, folder=tmp_path / "run").finished and "nothing to do" in capsys.readouterr().out
    with pytest.raises(BadInput, match="train.steps is 8: expected at least 12, which .* has done already"):
        wb.train(short, folder=tmp_path / "run")
    shutil.rmtree(run.folder / "checkpoints")
    with pytest.raises(BadInput, match="finished at 12, has no checkpoint to go on from"):
        wb.train(small(extra=[*STEADY, "train.steps=15"]), folder=tmp_path / "run")
    assert run.finished and run.summary["steps"] == 12
    for folder in list_checkpoints(whole.folder): (folder / "model.safetensors").write_bytes(b"torn")
    with (pytest.warns(UserWarning, match="is damaged"),
          pytest.raises(BadInput, match="no checkpoint to go on from: expected a whole one")):
        wb.train(small(extra=[*STEADY, "train.steps=15"]), folder=whole.folder)
    assert whole.finished and whole.metrics()["step"][-1] == 12 and (whole.folder / "model").is_dir()


def test_a_run_that_is_killed_while_it_is_made_longer_goes_on(tmp_path, monkeypatch):
    run = wb.train(small(extra=STEADY), folder=tmp_path / "run")
    def killed(*_): raise RuntimeError("killed")
    monkeypatch.setattr(setup, "to_yaml", killed)   # between the summary that is put away and the new config
    with pytest.raises(RuntimeError): wb.train(small(extra=[*STEADY, "train.steps=9"]), folder=tmp_path / "run")
    monkeypatch.undo()
    assert not run.finished and run.experiment.train.steps == 8
    run = wb.train(small(extra=[*STEADY, "train.steps=9"]), folder=tmp_path / "run")
    assert run.finished and equal(weights(run),
                                  weights(wb.train(small(extra=[*STEADY, "train.steps=9"]), folder=tmp_path / "whole")))


def test_a_schedule_that_depends_on_the_length_says_what_it_does(tmp_path, capsys):
    cosine = ["optim.lr_scheduler=cosine", "train.log_every=1"]
    wb.train(small(extra=cosine), folder=tmp_path / "run")
    capsys.readouterr()
    run = wb.train(small(extra=[*cosine, "train.steps=16"]), folder=tmp_path / "run")
    lr = small(extra=cosine).optim.lr
    assert (f"the cosine schedule of the learning rate, which ended at step 8, now ends at 16: it goes on at "
            f"{lr / 2:.3g}" in capsys.readouterr().out)
    want = [lr * (1 + math.cos(math.pi * s / 16)) / 2 for s in range(8, 16)]
    assert run.metrics()["lr"][8:] == pytest.approx(want)


def test_keys_that_change_no_figure_may_change_when_a_run_goes_on(tmp_path):
    changes = [*STEADY, "train.keep_last=5", "train.checkpoint_every=2", "train.log_every=2", "train.log_with=null",
               "data.num_workers=1", "train.sample_images=4", "train.on_nonfinite=skip"]
    wb.train(small(extra=[*STEADY, "train.steps=3", "train.log_with=tensorboard"]), folder=tmp_path / "run")
    run = wb.train(small(extra=changes), folder=tmp_path / "run")
    assert (equal(weights(run), weights(wb.train(small(extra=STEADY), folder=tmp_path / "whole")))
            and {p.name for p in list_checkpoints(run.folder)} >= {"step-0000003", "step-0000004", "step-0000006",
                                                                   "step-0000008"})
    e = run.experiment
    assert (e.train.keep_last, e.train.checkpoint_every, e.train.log_every, e.train.log_with, e.data.num_workers,
            e.train.on_nonfinite) == (5, 2, 2, None, 1, "skip")
    for other in ("optim.lr=0.5", "seed=3", "train.batch_size=4", "train.ema_decay=0.5"):
        with pytest.raises(BadInput, match=f"holds another experiment: {other.partition('=')[0]} is"):
            wb.train(small(extra=[*STEADY, other]), folder=tmp_path / "run")


# --- what a kill leaves

def test_what_killed_processes_left_is_gone_after_the_next_start_and_nothing_else(tmp_path):
    run = wb.train(small(extra=[*STEADY, "train.keep_last=3"]), folder=tmp_path / "run").folder
    kept = {p.name for p in list_checkpoints(run)}
    (run / "samples").mkdir(exist_ok=True)
    left = [".metrics.jsonl.ab12cd34.tmp", ".summary.json.ab12cd34.tmp", ".config.yaml.ab12cd34.tmp",
            "samples/.step-0000003.png.ab12cd34.tmp"]
    mine = [".notes.txt.tmp", ".model.txt", "samples/.mine.png.ab12cd34.tmp", ".model.mine"]
    for name in (*left, *mine): (run / name).write_text("x")
    for name in (".model.ab12cd34.tmp", ".patch.ab12cd34.tmp", ".model.ab12cd34.old"): (run / name).mkdir()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "a.txt").write_text("x")
    (run / ".model.linked01.tmp").symlink_to(elsewhere)
    (run / "checkpoints" / ".step-0000003.ab12cd34.old").mkdir()
    cut_off = run / "checkpoints" / ".step-0000004.ab12cd34.tmp"   # in the middle of safetensors' own writing
    for folder in (cut_off, run / ".model.ab12cd34.tmp"):
        folder.mkdir(exist_ok=True)
        for name in ("model.safetensors", ".tmpRZMgbx"): (folder / name).write_text("x")
    shutil.copytree(run / "checkpoints" / "step-0000006", run / "checkpoints" / "step-0000002")   # a surplus one
    (run / "checkpoints" / "step-0000002" / "manifest.json").unlink()                             # and half of it gone
    wb.train(small(extra=[*STEADY, "train.keep_last=2", "train.steps=9"]), folder=run)
    names = {str(p.relative_to(run)) for p in run.rglob("*")}
    assert not names & set(left) and set(mine) <= names and (elsewhere / "a.txt").exists()
    assert not [n for n in names if n.startswith((".model.ab", ".patch.ab", "checkpoints/."))]
    assert [p.name for p in list_checkpoints(run)] == ["step-0000008", "step-0000009"] and "step-0000006" in kept


def test_an_error_leaves_no_worker_that_reads_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "append_row", lambda *_: 1 / 0)
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    try: wb.train(small(extra=["data.num_workers=2"]), folder=tmp_path / "run")
    except ZeroDivisionError as e: held = e   # as a notebook holds its newest traceback
    assert held.__traceback__ and {p.pid for p in psutil.Process().children(recursive=True)
                                   if p.status() != psutil.STATUS_ZOMBIE} <= before


# --- the parts of the loop

@pytest.mark.parametrize("how,said", [
    ("stop", ["take", "stop", "stop", "take", "stop"]),
    ("skip", ["take", "skip", "skip", "take", "skip"]),
    ("rollback", ["take", "rollback", "rollback", "take", "stop"]),
])
def test_what_becomes_of_a_step_that_is_not_finite(how, said):
    policy = NonFinite(TrainConfig(on_nonfinite=how, nonfinite_limit=2), Accelerator(cpu=True))
    steps = zip((True, False, False, True, False), (1.0, 1.0, 0.5, 0.25, 0.25))
    assert [policy.judge(finite, lr_scale) for finite, lr_scale in steps] == said
    if how == "skip": assert [policy.judge(False, 1.0) for _ in range(2)] == ["skip", "stop"]


@pytest.mark.parametrize("loss,norm,asked,bad", [(1.0, 2.0, 0, False), (float("nan"), 2.0, 1, True),
                                                 (1.0, float("inf"), 0, True)])
def test_one_sum_tells_whether_a_step_is_finite_and_who_was_asked_to_stop(loss, norm, asked, bad):
    told = Told(torch.tensor(loss), torch.tensor(norm), asked, Accelerator(cpu=True))
    assert told.read() == (bad, asked) and told.bad.item() == bad


def test_overflows_are_the_scaler_s_business_twenty_times_in_a_row():
    accelerator = Accelerator(cpu=True)
    policy = NonFinite(TrainConfig(on_nonfinite="stop"), accelerator)
    policy.accelerator = type("WithScaler", (), {"scaler": object(), "num_processes": 1})()
    said = [policy.judge(False, 1.0) for _ in range(21)]
    assert said == ["overflow"] * 20 + ["stop"]


def test_processes_share_the_places_of_a_batch():
    parts = [places_of(24, 2, rank, 3).tolist() for rank in range(3)]
    assert sorted(sum(parts, [])) == list(range(24)) and parts[1] == [4, 5, 6, 7, 16, 17, 18, 19]


def test_the_loop_can_be_read_aloud():
    lines = inspect.getsource(loop.take_steps).splitlines()
    assert len(lines) <= 60 and [line.strip()[2:4] for line in lines if line.strip().startswith("# ")] == [
        "1.", "2.", "3.", "4.", "5."]
