"Training on folders, latents and captions; trackers, grids and optimisers."
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import SMALL, Killed, equal, weights

import dmp_wb as wb
from dmp_wb.data import sources
from dmp_wb.diffusion import objectives
from dmp_wb.models import anatomy
from dmp_wb.training import batches
from dmp_wb.training import loop
from dmp_wb.training import record
from dmp_wb.training import setup
from dmp_wb.training import state as training_state
from dmp_wb.store.checkpoints import load_checkpoint, newest_checkpoint
from dmp_wb.core.errors import BadInput
from dmp_wb.core.settings import DataConfig
from dmp_wb.data.cache import write_cache
from dmp_wb.data.encoders import LatentCoder
from dmp_wb.data.load import load_data

RUN = ["train.batch_size=8", "train.steps=6", "train.log_every=2", "train.checkpoint_every=3", "train.log_with=null"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Three classes of eight 20 × 16 images, one of them damaged; a VAE of factor 2."
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for c, name in enumerate(("ant", "bee", "cat")):
        (root / "images" / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray((rng.integers(0, 60, (16, 20, 3)) + 60 * c).astype(np.uint8)).save(
                root / "images" / name / f"{i}.png")
    (root / "images" / "bee" / "3.png").write_bytes(b"no image")
    torch.manual_seed(0)
    AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                  block_out_channels=[8, 8], norm_num_groups=4, sample_size=16).save_pretrained(root / "vae")
    return root


def experiment(photos, *extra, method="pretrain"):
    return wb.load_experiment(wb.Experiment(name="sources"),
                              [f"data.name={photos / 'images'}", "data.size=16", "data.flip=true",
                               "model.num_classes=3", "model.patch_size=2", *SMALL, *RUN, *extra])


def pixels(photos, *extra): return experiment(photos, "model.in_channels=3", "model.sample_size=16", *extra)


def latents(photos, *extra):
    return experiment(photos, "model.in_channels=4", "model.sample_size=8", f"data.vae={photos / 'vae'}", *extra)


def die_at(monkeypatch, step):
    original = record.append_row

    def die(run, row):
        original(run, row)
        if row["step"] == step: raise Killed
    monkeypatch.setattr(loop, "append_row", die)


@pytest.mark.parametrize("extra,expected", [
    (["train.mixed_precision=bf16"], torch.bfloat16),
    (["train.mixed_precision=bf16", "train.batch_format=1"], torch.float32),   # as runs began before format 2
    ([], torch.float32),
])
def test_a_vae_in_the_loop_computes_in_bfloat16_where_the_training_does(extra, expected, photos, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(LatentCoder, "moments", lambda self, images, moments=LatentCoder.moments: (
        seen.append(moments(self, images)) or seen[-1]))
    run = wb.train(latents(photos, "train.steps=2", *extra), folder=tmp_path / "run")
    assert {m.dtype for m in seen} == {expected} and run.summary["loss"] < 10


def test_a_vae_in_the_loop_is_compiled_where_the_model_is(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "missing_compiler", lambda device: None)
    encoders = [setup.make_parts(latents(photos, f"train.compile={on}"), tmp_path / on).data.coder.vae.encoder
                for on in ("true", "false")]
    assert [e._compiled_call_impl is not None for e in encoders] == [True, False]


def test_workers_and_interruptions_change_nothing(photos, tmp_path, monkeypatch):
    runs = [wb.train(pixels(photos, f"data.num_workers={n}"), folder=tmp_path / str(n)) for n in (0, 2)]
    assert equal(*map(weights, runs))
    for run in runs:
        assert run.summary["images_skipped"] == 1 and (run.folder / "skipped-images.txt").read_text().startswith(
            "skipped image 1: bee/3.png is no image")
    with monkeypatch.context() as m:
        die_at(m, 4)
        with pytest.raises(Killed): wb.train(pixels(photos, "data.num_workers=1"), folder=tmp_path / "broken")
    assert equal(weights(wb.train(pixels(photos), folder=tmp_path / "broken")), weights(runs[0]))
    assert not equal(weights(wb.train(pixels(photos, "data.flip=false"), folder=tmp_path / "straight")),
                     weights(runs[0]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_to_the_whole_group_leave_a_checkpoint(number, photos, tmp_path):
    "As torchrun, Slurm and a terminal send them: the workers that read ahead get them too."
    exp = pixels(photos, "train.steps=100000", "train.checkpoint_every=100000", "data.num_workers=1")
    (tmp_path / "x.yaml").write_text(wb.config.to_yaml(exp))
    process = subprocess.Popen([sys.executable, "-m", "dmp_wb.training", str(tmp_path / "x.yaml"), "--folder",
                                str(tmp_path / "run")], env={**os.environ, "OMP_NUM_THREADS": "1"},
                               start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode == (130 if number == signal.SIGINT else 0) and "stopped by a signal at step" in said
            and newest_checkpoint(tmp_path / "run") is not None)


def poison(monkeypatch, *calls_that_fail):
    original, calls = objectives.diffusion_losses, []

    def losses(*a, **k):
        calls.append(1)
        return {n: v * (float("nan") if len(calls) in calls_that_fail else 1) for n, v in original(*a, **k).items()}
    monkeypatch.setattr(loop, "diffusion_losses", losses)


def test_a_rollback_before_the_first_checkpoint_starts_anew(tmp_path, monkeypatch):
    settings = [*SMALL, "train.checkpoint_every=100", "train.on_nonfinite=rollback", "train.log_with=null"]
    poison(monkeypatch, 5, 10)                                     # step 4 of the first life, step 4 of the second
    run = wb.train("digits-quick", settings, folder=tmp_path / "r")
    monkeypatch.undo()
    quarter = wb.train("digits-quick", [*settings, "optim.lr=0.0005"], folder=tmp_path / "quarter")
    assert wb.load_experiment("digits-quick").optim.lr == 0.002    # halved twice
    assert (equal(weights(run), weights(quarter)) and run.metrics()["loss"] == quarter.metrics()["loss"]
            and run.metrics()["lr"] == pytest.approx(quarter.metrics()["lr"]))


def test_a_skipped_step_is_not_in_the_means(tmp_path, monkeypatch):
    settings = [*SMALL, "train.on_nonfinite=skip", "train.log_with=null", "train.log_every=1"]
    poison(monkeypatch, 5, 8)
    run = wb.train("digits-quick", settings, folder=tmp_path / "r")
    m = run.metrics()
    assert (m["loss"][4] is None and m["loss"][7] is None
            and all(v is not None for i, v in enumerate(m["loss"]) if i not in (4, 7))
            and m["skipped"] == [0, 0, 0, 0, 1, 1, 1, 2])
    assert run.summary["loss"] == m["loss"][6] and "NaN" not in (run.folder / "summary.json").read_text()


def test_too_many_bad_images(photos, tmp_path):
    with pytest.raises(BadInput, match="1 images cannot be read, more than data.max_bad_images, 0; the first, "
                       "bee/3.png, is no image"):
        wb.train(pixels(photos, "data.max_bad_images=0", "train.steps=20"), folder=tmp_path / "r")


def test_cached_latents_train_as_encoded_images_do(photos, tmp_path):
    # a cache leaves a damaged image out, the loop replaces it
    (photos / "images" / "bee" / "3.png").rename(photos / "3.png")
    try:
        live = wb.train(latents(photos), folder=tmp_path / "live")
        cache = write_cache(DataConfig(name=str(photos / "images"), size=16, vae=str(photos / "vae"), num_workers=0),
                            tmp_path / "cache", images_per_shard=7)
    finally: (photos / "3.png").rename(photos / "images" / "bee" / "3.png")
    assert len(cache) == 23
    cached = wb.train(latents(photos, f"data.name={tmp_path / 'cache'}", "train.sample_every=6",
                              "train.sample_images=4"), folder=tmp_path / "cached")
    assert torch.allclose(torch.tensor(live.metrics()["loss"]), torch.tensor(cached.metrics()["loss"]), rtol=1e-4)
    assert all(torch.allclose(a, weights(cached)[k], atol=2e-4) for k, a in weights(live).items())
    assert Image.open(cached.folder / "samples" / "step-0000006.png").size == (32, 32)   # four images, decoded
    with pytest.raises(BadInput, match="data.size is 32, but latent cache"):
        wb.train(latents(photos, f"data.name={tmp_path / 'cache'}", "data.size=32"), folder=tmp_path / "x")
    with pytest.raises(BadInput, match="the model takes 4×16×16 latents, but data .* has 4×8×8"):
        wb.train(latents(photos, f"data.name={tmp_path / 'cache'}", "model.sample_size=16"), folder=tmp_path / "x")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    "A data set with captions, a tiny text-conditioned U-Net, and a pipeline folder with tokenizer and text encoder."
    import datasets
    from pipelines import PIPELINES
    root, rng = tmp_path_factory.mktemp("captioned"), np.random.default_rng(1)
    pipe = PIPELINES["StableDiffusionPipeline"](root / "tokens")
    pipe.save_pretrained(root / "pipeline")
    images = [Image.fromarray(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)) for _ in range(12)]
    datasets.Dataset.from_dict({
        "image": images, "text": [f"a {w} thing" for w in ("red", "green", "blue")] * 4}, features=datasets.Features(
            {"image": datasets.Image(), "text": datasets.Value("string")})).save_to_disk(root / "set")
    width = pipe.text_encoder.config.hidden_size
    torch.manual_seed(0)
    UNet2DConditionModel(sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1,
                         cross_attention_dim=width, norm_num_groups=4, attention_head_dim=4,
                         down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                         up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")).save_pretrained(root / "unet")
    return root


def captions(root, *extra):
    return wb.load_experiment(wb.Experiment(name="captions", method="dmp", base=str(root / "unet")),
                              [f"data.name={root / 'set'}", "data.size=16", "data.caption_column=text",
                               f"data.text_encoder={root / 'pipeline'}", "train.label_dropout=0.3", "optim.lr=1e-2",
                               *RUN, *extra])


def test_captions_condition_a_u_net(captioned, tmp_path, monkeypatch):
    run = wb.train(captions(captioned, "train.sample_every=6", "train.sample_images=3"), folder=tmp_path / "run")
    assert run.finished and Image.open(run.folder / "samples" / "step-0000006.png").mode == "RGB"
    deaf = batches.draw_batch

    def one_caption(exp, data, *args, **kwargs):
        batch = deaf(exp, data, *args, **kwargs)
        return batch | {k: v[:1].expand_as(v) for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    with monkeypatch.context() as m:
        m.setattr(batches, "draw_batch", one_caption)
        # captions reach the model
        assert wb.train(captions(captioned, "data.num_workers=0"),
                        folder=tmp_path / "deaf").metrics()["loss"] != run.metrics()["loss"]


def test_captions_make_images(captioned, tmp_path):
    "Image i is of caption i whatever the batches; new captions and the data's own; measured as well."
    from dmp_wb.evaluation.evaluate import evaluate_run
    from dmp_wb.data.load import captions_of
    from dmp_wb.diffusion.sampling import sample
    from dmp_wb.evaluation.sample_files import sample_run
    run = wb.train(captions(captioned, "train.steps=2"), folder=tmp_path / "run")
    model, data = wb.load_model(run.folder, device="cpu"), load_data(run.experiment.data)
    fast, words = dict(sampler="ddim", num_inference_steps=2, seed=3, quiet=True), ["a red thing", "a green thing"]
    images = sample(model, 4, texts=captions_of(model, data, words), batch_size=3, **fast)
    assert torch.allclose(images, sample(model, 4, texts=captions_of(model, data, words * 2), batch_size=1, **fast),
                          atol=2e-3)
    embedded = data.texts(words * 2)
    known = [k for k in embedded if k in anatomy.model_inputs(model)]
    assert torch.allclose(images, sample(model, 4, conditions={k: embedded[k] for k in known},
                                         null_conditions={k: data.null[k] for k in known}, **fast), atol=2e-3)
    assert not torch.allclose(images[:2], sample(model, 2, texts=captions_of(model, data, words[::-1]), **fast),
                              atol=2e-2)
    # of twelve examples the first two come again
    assert torch.allclose(sample(model, 2, texts=captions_of(model, data), first=12, **fast),
                          sample(model, 2, texts=captions_of(model, data, words), first=12, **fast), atol=2e-3)
    (tmp_path / "captions.txt").write_text("a red thing\na green thing\n")
    kept = dict(num_images=3, sampler="ddim", num_inference_steps=2, seed=3, device="cpu", quiet=True)
    folder = sample_run(run.folder, captions=tmp_path / "captions.txt", **kept)
    drawn = torch.from_numpy(np.stack(
        [np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(3)])).permute(0, 3, 1, 2) / 127.5 - 1
    assert (drawn - images[:3]).abs().max() < 0.02
    # the data's own are other images
    with pytest.raises(BadInput, match="captions is "): sample_run(run.folder, **kept)
    row = evaluate_run(run.folder, 12, metrics="fid", extractor=torch.nn.Flatten(), num_inference_steps=2, quiet=True)
    assert row["num_images"] == 12 and np.isfinite(row["fid"])


def test_captions_dropped_are_the_empty_one(captioned):
    data = load_data(captions(captioned).data)
    batch = data.encode(data.batch(torch.arange(4), drop=torch.tensor([True, False, True, False])))
    empty = data.null["encoder_hidden_states"]
    assert (all(torch.allclose(batch["encoder_hidden_states"][i], empty, atol=1e-5) for i in (0, 2))
            and not torch.allclose(batch["encoder_hidden_states"][1], empty, atol=1e-3))


def test_a_model_that_takes_no_text_is_refused(captioned, tmp_path):
    with pytest.raises(BadInput, match="has captions, but the model, a DiT, takes no text"):
        wb.train(captions(captioned, "method=pretrain", "base=null", "model.in_channels=3", "model.sample_size=16",
                          "model.num_classes=null", "model.patch_size=2", *SMALL[:3]), folder=tmp_path / "r")
    from diffusers import UNet2DConditionModel
    other = UNet2DConditionModel.from_config({**UNet2DConditionModel.load_config(captioned / "unet"),
                                              "cross_attention_dim": 12})
    other.save_pretrained(tmp_path / "unet")
    with pytest.raises(BadInput, match="a UNet2DConditionModel, cannot be called with encoder_hidden_states"):
        wb.train(captions(captioned, f"base={tmp_path / 'unet'}"), folder=tmp_path / "r")
    with pytest.raises(BadInput, match="data.text_encoder is null"):
        wb.train(captions(captioned, "data.text_encoder=null"), folder=tmp_path / "r")
    assert not (tmp_path / "r").exists()


# --- what is logged

def scalars(run):
    events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


def test_tensorboard_holds_what_metrics_hold(photos, tmp_path, monkeypatch):
    extra = ["train.log_with=tensorboard", "train.sample_every=3", "train.sample_images=4"]
    with monkeypatch.context() as m:
        die_at(m, 4)
        with pytest.raises(Killed): wb.train(pixels(photos, *extra), folder=tmp_path / "r")
    run = wb.train(pixels(photos, *extra), folder=tmp_path / "r")
    found, events = scalars(run)
    rows = run.metrics()
    assert {"loss", "mse", "lr", "grad_norm", "images_per_second", "memory_gib", "mse/t000-124"} <= set(found)
    for tag, values in found.items():
        # each step once, though step 4 was logged by both lives
        assert values == [(s, pytest.approx(v, rel=1e-6))
                          for s, v in zip(rows["step"], rows[tag]) if v is not None], tag
    assert [e.step for e in events.Images("samples")] == [3, 6]
    assert "data.size" in str(events.Tensors("config/text_summary")[0]) or "size: 16" in str(
        events.Tensors("config/text_summary")[0])
    assert sorted(p.name for p in (run.folder / "samples").iterdir()) == ["step-0000003.png", "step-0000006.png"]


def test_grids_do_not_touch_the_training(photos, tmp_path):
    plain = wb.train(pixels(photos), folder=tmp_path / "plain")
    for name in ("adamw", "schedule-free"):
        a, b = (wb.train(pixels(photos, f"optim.name={name}", *extra), folder=tmp_path / f"{name}-{len(extra)}")
                for extra in ([], ["train.sample_every=2", "train.sample_images=4"]))
        assert equal(weights(a), weights(b))
        assert equal(weights(a), weights(plain)) == (name == "adamw")
    pictures = [(p / "samples" / "step-0000006.png").read_bytes() for p in (tmp_path / "adamw-2",)]
    assert (wb.train(pixels(photos, "train.sample_every=6", "train.sample_images=4"), folder=tmp_path / "again")
            and (tmp_path / "again" / "samples" / "step-0000006.png").read_bytes() == pictures[0])


def test_mse_by_timestep_interval(tmp_path):
    run = wb.train("digits-quick", [*SMALL, "train.log_with=null", "train.log_every=8", "train.log_intervals=3"],
                   folder=tmp_path / "r")
    exp, data = run.experiment, load_data("digits")
    order, rows = sources.EpochOrder(len(data), 16, exp.seed), run.metrics()
    counts = sum(torch.bincount(batches.draw_batch(exp, data, order, s, 10)["timesteps"] * 3 // 1000, minlength=3)
                 for s in range(8))
    parts = [rows[k][0] for k in ("mse/t000-333", "mse/t334-666", "mse/t667-999")]
    assert sum(p * n for p, n in zip(parts, counts.tolist())) / 128 == pytest.approx(rows["mse"][0], rel=1e-5)
    empty = wb.train("digits-quick", [*SMALL, "train.log_with=null", "train.log_every=1", "train.steps=1",
                                      "train.log_intervals=500"], folder=tmp_path / "empty").metrics()
    assert sum(v[0] is not None for k, v in empty.items() if k.startswith("mse/")) <= 16


def test_gate_statistics(tmp_path):
    run = wb.train("digits-dmp", [*SMALL, "train.log_with=null", "train.log_every=1", "train.steps=2"],
                   folder=tmp_path / "r")
    rows = run.metrics()
    assert 0 < rows["gate_entropy"][0] <= math.log(50) + 1e-5 and 0 < rows["prompt_use"][0] <= 1 + 1e-5
    model = wb.load_model("digits-base")
    patch = wb.patch(model, wb.DMPConfig(num_prompts=4))
    with torch.no_grad(): patch.gate.weight.zero_(), patch.gate.bias.zero_()
    model(torch.zeros(3, 1, 8, 8), timestep=torch.tensor([1, 500, 999]), class_labels=torch.tensor([0, 1, 2]))
    assert (patch.gate_statistics()["gate_entropy"] == pytest.approx(math.log(4))
            and patch.gate_statistics()["prompt_use"] == pytest.approx(1))
    with torch.no_grad(): patch.gate.bias.view(-1, 4)[:, 0] = 50.0
    model(torch.zeros(3, 1, 8, 8), timestep=torch.tensor([1, 500, 999]), class_labels=torch.tensor([0, 1, 2]))
    assert (patch.gate_statistics()["gate_entropy"] == pytest.approx(0, abs=1e-5)
            and patch.gate_statistics()["prompt_use"] == pytest.approx(0.25))


# --- optimisers, compilation, aggregators with a memory

def test_schedule_free_exports_its_own_average_and_resumes(tmp_path, monkeypatch):
    settings = [*SMALL, "optim.name=schedule-free", "optim.lr=1e-2", "optim.lr_warmup_steps=3",
                "optim.lr_scheduler=constant", "train.log_with=null"]
    whole = wb.train("digits-quick", settings, folder=tmp_path / "whole")
    with monkeypatch.context() as m:
        die_at(m, 4)
        with pytest.raises(Killed): wb.train("digits-quick", settings, folder=tmp_path / "broken")
    assert equal(weights(whole), weights(wb.train("digits-quick", settings, folder=tmp_path / "broken")))
    state = load_checkpoint(newest_checkpoint(whole.folder))
    exported = dict(wb.load_model(whole.folder).named_parameters())
    for n, (name, y) in enumerate(state["model"].items()):   # y = (1 − β₁) z + β₁ x, so x = (y − (1 − β₁) z) / β₁
        z = state["optimizer"]["state"][n]["z"]
        assert torch.allclose(exported[name], (y - 0.1 * z) / 0.9, atol=1e-5), name
    with pytest.raises(BadInput, match="optim.lr_scheduler is 'cosine': expected constant with schedule-free"):
        wb.load_experiment("digits-quick", [*settings, "optim.lr_scheduler=cosine"])


@pytest.mark.parametrize("settings,match", [
    (["optim.name=adamw-8bit"],
     "optim.name is 'adamw-8bit', which needs the package bitsandbytes: pip install bitsandbytes"),
    (["optim.name=adam"], "unknown optim.name 'adam': did you mean 'adamw'"),
    (["train.log_with=tensorboard,wandb"], "wandb is not installed: pip install wandb"),
    (["train.log_with=tensorbord"], "unknown train.log_with 'tensorbord': did you mean 'tensorboard'"),
    (["format=3"], "format is 3: expected 2"), (["data.size=16"], "data.size is 16: expected null or 8"),
    (["data.name=./nowhere"], "there is no such folder"),
])
def test_mistakes_write_nothing(settings, match, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    monkeypatch.setattr(setup, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(BadInput, match=match): wb.train("digits-quick", [*SMALL, *settings], folder=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_config_of_another_format_is_named_before_its_keys(tmp_path):
    (tmp_path / "new.yaml").write_text("format: 3\nsomething: new\n")
    with pytest.raises(BadInput, match="new.yaml is of config format 3: expected 2 or 1"):
        wb.load_experiment(tmp_path / "new.yaml")


@pytest.mark.parametrize("method", ["NashMTL", "GradVac"])
def test_aggregators_that_remember_resume(method, tmp_path, monkeypatch):
    settings = [*SMALL, f"multitask.method={method}", "multitask.k=3", "train.log_with=null"]
    whole = wb.train("digits-quick", settings, folder=tmp_path / "whole")
    assert load_checkpoint(newest_checkpoint(whole.folder))["aggregator"]
    with monkeypatch.context() as m:
        die_at(m, 4)
        with pytest.raises(Killed): wb.train("digits-quick", settings, folder=tmp_path / "broken")
    assert equal(weights(whole), weights(wb.train("digits-quick", settings, folder=tmp_path / "broken")))
    with monkeypatch.context() as m:   # without its memory it goes another way
        m.setattr(training_state, "restore_aggregator", lambda *a: None)
        die_at(m, 4)
        with pytest.raises(Killed): wb.train("digits-quick", settings, folder=tmp_path / "forgetful")
        m.undo()
        m.setattr(training_state, "restore_aggregator", lambda *a: None)
        forgetful = wb.train("digits-quick", settings, folder=tmp_path / "forgetful")
    assert not equal(weights(whole), weights(forgetful))


@pytest.mark.parametrize("name", ["digits-quick", "digits-dmp"])
def test_compiled_training_learns_the_same(name, tmp_path):
    settings = [*SMALL, "train.steps=2", "train.log_every=1", "train.log_with=null"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, compiled = (wb.train(name, [*settings, f"train.compile={c}"], folder=tmp_path / c)
                           for c in ("false", "true"))
    assert plain.metrics()["loss"] == pytest.approx(compiled.metrics()["loss"], rel=1e-4)
    wb.load_model(compiled.folder)   # what was saved has plain names
    assert json.loads((compiled.folder / "summary.json").read_text())["status"] == "finished"
