"Many images in files: exact, resumable, the same whoever draws them."
import hashlib
import itertools
import json
import os
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import randomise, tiny_dit
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

import dmp_wb as wb
from dmp_wb.core import files as core_files
from dmp_wb.data import images
from dmp_wb.diffusion import sampling as diffusion_sampling
from dmp_wb.evaluation import sample_files
from dmp_wb.config import to_yaml
from dmp_wb.core.errors import BadInput, MissingFile
from dmp_wb.core.settings import DataConfig, SamplingConfig
from dmp_wb.data.cache import write_cache
from dmp_wb.evaluation.sample_files import sample_run, SAMPLES_FILE, SAMPLES_PLAN

FAST = dict(num_inference_steps=3, device="cpu", quiet=True)


def make_run(folder, model=None, **changes):
    "A finished run with this model."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        to_yaml(wb.Experiment(name=folder.name, model=wb.ModelConfig("DiT-S/2"), **changes)))
    (model or tiny_dit(out_channels=2)).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def run(tmp_path): return make_run(tmp_path / "run")


def files(folder): return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != ".lock"}


def array(folder):
    with np.load(folder / SAMPLES_FILE) as f: return f["arr_0"]


# --- what is written

@pytest.mark.parametrize("channels", [1, 3])
def test_files_are_what_sample_draws(channels, tmp_path):
    model = tiny_dit(in_channels=channels, out_channels=2 * channels)
    run = make_run(tmp_path / "run", model)
    folder = sample_run(run, 7, tmp_path / "out", batch_size=3, guidance_scale=2.0, seed=5, **FAST)
    drawn = torch.cat([wb.sample(model, class_labels=range(i, min(i + 3, 7)), first=i, guidance_scale=2.0,
                                 num_inference_steps=3, seed=5, quiet=True) for i in (0, 3, 6)])
    want = ((drawn + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert folder == tmp_path / "out" and sorted(files(folder)) == sorted(
        [f"{i:06d}.png" for i in range(7)] + [SAMPLES_PLAN, SAMPLES_FILE])
    for i in range(7):
        with Image.open(folder / f"{i:06d}.png") as image:
            assert image.mode == ("L" if channels == 1 else "RGB")
            assert np.array_equal(np.asarray(image).reshape(8, 8, channels), want[i])
    found = array(folder)
    assert found.dtype == np.uint8 and found.shape == (7, 8, 8, 3) and np.array_equal(
        found, np.repeat(want, 3 // channels, -1))
    assert len({f.tobytes() for f in found}) == 7 and oct((folder / SAMPLES_FILE).stat().st_mode) == oct(
        (folder / "000000.png").stat().st_mode)


def test_npz_is_one_that_numpy_would_write(run, tmp_path):
    folder = sample_run(run, 5, **FAST)
    np.savez(tmp_path / "numpy.npz", arr_0=array(folder))
    with zipfile.ZipFile(folder / SAMPLES_FILE) as ours, zipfile.ZipFile(tmp_path / "numpy.npz") as theirs:
        assert (ours.testzip() is None and ours.namelist() == theirs.namelist() == ["arr_0.npy"]
                and ours.infolist()[0].compress_type == zipfile.ZIP_STORED)
        with ours.open("arr_0.npy") as f:   # as ADM's evaluator streams it
            assert np.lib.format.read_magic(f) == (1, 0) and np.lib.format.read_array_header_1_0(f) == ((5, 8, 8, 3),
                                                                                                        False, np.uint8)
        assert ours.read("arr_0.npy") == theirs.read("arr_0.npy")


def test_settings_reach_the_sampler(run, tmp_path):
    n, draw = itertools.count(), lambda **kw: hashlib.sha256((sample_run(run, 2, tmp_path / str(next(n)), **{
        **FAST, "guidance_scale": 3.0, **kw}) / SAMPLES_FILE).read_bytes()).hexdigest()
    kinds = [{}, dict(seed=1), dict(guidance_scale=1.0), dict(sampler="ddim"), dict(sampler="heun"),
             dict(num_inference_steps=4), dict(sampler="ddpm", num_inference_steps="1,3"),
             dict(guidance_interval=(0, 500)), dict(class_labels=[5, 6])]
    assert (len({draw(**kind) for kind in kinds}) == len(kinds) and draw() == draw() == draw(class_labels=None)
            == draw(class_labels=[0, 1]) == draw(guidance_channels=1) == draw(guidance_interval=(0, 999)))


def test_flow_matching_and_prediction_types_come_from_the_run(tmp_path):
    from dmp_wb.core.settings import ObjectiveConfig
    from dmp_wb.core.settings import ScheduleConfig
    model = tiny_dit()
    for kind, sampler in (("flow_prediction", "flow-euler"), ("v_prediction", "dpmsolver++")):
        run = make_run(tmp_path / kind, model, objective=ObjectiveConfig(prediction_type=kind),
                       schedule=ScheduleConfig("cosine", 300))
        folder = sample_run(run, 3, **FAST)
        want = wb.sample(model, 3, sampler=sampler, prediction_type=kind, schedule=ScheduleConfig("cosine", 300),
                         num_inference_steps=3, quiet=True)
        assert folder == run / "samples" / f"{sampler}-3-g1.5-3" and np.array_equal(
            array(folder)[..., 0], ((want[:, 0] + 1) * 127.5).round().byte().numpy())


def test_a_shipped_run_writes_below_the_runs_folder(runs_folder):
    folder = sample_run("digits-dmp", 2, **FAST)
    assert folder == runs_folder / "digits-dmp" / "samples" / "dpmsolver++-3-g1.5-2"
    base = sample_run("digits-dmp", 2, runs_folder / "base", patched=False, **FAST)
    assert not np.array_equal(array(base), array(folder))
    with pytest.raises(BadInput, match="patch is None there and"): sample_run("digits-dmp", 2, base, **FAST)


def test_labels_of_a_file(run, tmp_path):
    (tmp_path / "labels.txt").write_text("3 1\n4\n1 5\n")
    a, b = (sample_run(run, 5, tmp_path / name, labels, **FAST)
            for name, labels in (("a", tmp_path / "labels.txt"), ("b", [3, 1, 4, 1, 5])))
    assert files(a) == files(b)
    assert np.array_equal(array(sample_run(run, 5, tmp_path / "c", str(tmp_path / "labels.txt"), **FAST)), array(a))
    assert not np.array_equal(array(sample_run(run, 5, tmp_path / "d", "balanced", **FAST)), array(a))


def test_unconditional(tmp_path):
    run = make_run(tmp_path / "run", tiny_dit(num_classes=None))
    assert len(array(sample_run(run, 3, **FAST))) == 3
    with pytest.raises(BadInput, match="unconditional"): sample_run(run, 2, class_labels=[0, 1], **FAST)


# --- kills

class Killed(BaseException): pass


JOB = dict(batch_size=3, **FAST)   # of eight images: three batches


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    root = tmp_path_factory.mktemp("unbroken")
    return files(sample_run(make_run(root / "run"), 8, root / "whole", **JOB))


@pytest.fixture
def whole(unbroken, tmp_path):
    (tmp_path / "whole").mkdir()
    for name, content in unbroken.items(): (tmp_path / "whole" / name).write_bytes(content)
    return unbroken


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("nth", range(9))
def test_killed_at_any_file(nth, before, run, whole, tmp_path, monkeypatch):
    "The plan is the first file that is written, then the images."
    calls, folder = itertools.count(), tmp_path / "out"

    def deadly(original):
        def write(path, content):
            n = next(calls)
            if n == nth and not before: original(path, content)
            if n >= nth: raise Killed
            return original(path, content)
        return write
    with monkeypatch.context() as m:
        m.setattr(core_files, "write_atomic", deadly(core_files.write_atomic))
        m.setattr(sample_files, "write_atomic", core_files.write_atomic)
        with pytest.raises(Killed): sample_run(run, 8, folder, **JOB)
    left = files(folder) if folder.exists() else {}
    assert SAMPLES_FILE not in left and all(whole[name] == content for name, content in left.items())
    kept = {name: (folder / name).stat().st_mtime_ns for name in left}
    assert sample_run(run, 8, folder, **JOB) == folder and files(folder) == whole
    # what was there is not drawn again
    assert all((folder / name).stat().st_mtime_ns == at for name, at in kept.items())


@pytest.mark.parametrize("nth", range(4))
def test_killed_while_the_npz_is_written(nth, run, whole, tmp_path, monkeypatch):
    folder, calls = tmp_path / "out", itertools.count()
    with monkeypatch.context() as m:
        if nth == 3:
            m.setattr(sample_files.os, "replace", lambda a, b, replace=os.replace: replace(a, b)
                      if str(b).endswith((".png", ".json")) else (_ for _ in ()).throw(Killed))
        else:
            original = images.read_image
            m.setattr(sample_files, "read_image",
                      lambda *a: original(*a) if next(calls) < 3 * nth else (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed): sample_run(run, 8, folder, **JOB)
    assert SAMPLES_FILE not in files(folder) and len(list(folder.glob("*.png"))) == 8
    # what SIGKILL leaves
    (folder / ".samples.npz.x.tmp").write_bytes(b"half of one"); (folder / ".000004.png.y.tmp").write_bytes(b"torn")
    assert sample_run(run, 8, folder, **JOB) == folder and files(folder) == whole


@pytest.mark.parametrize("gone", [["000000.png"], ["000007.png"], ["000001.png", "000004.png", "samples.npz"],
                                  ["samples.npz"], [f"{i:06d}.png" for i in range(8)]])
def test_what_is_missing_is_drawn_again(gone, run, whole, tmp_path):
    for name in gone: (tmp_path / "whole" / name).unlink()
    assert sample_run(run, 8, tmp_path / "whole", **JOB) and files(tmp_path / "whole") == whole


def test_a_finished_job_draws_nothing(run, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion_sampling._Walk, "finish", None)
    assert sample_run(run, 8, tmp_path / "whole", **JOB) == tmp_path / "whole" and files(tmp_path / "whole") == whole


@pytest.mark.parametrize("world", [2, 3, 5])
def test_parts_in_any_order_make_the_same_files(world, run, whole, tmp_path):
    folder = tmp_path / "out"
    for rank in reversed(range(world)):
        assert (sample_run(run, 8, folder, part=(rank, world), **JOB) is None) == (rank > 0)
    assert files(folder) == whole   # with five processes two have nothing to do


def test_another_number_of_processes_goes_on(run, whole, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    monkeypatch.setenv("RANK", "1"); monkeypatch.setenv("WORLD_SIZE", "2")
    assert (sample_run(run, 8, folder, **JOB) is None and len(list(folder.glob("*.png"))) == 3
            and not (folder / SAMPLES_FILE).exists())
    assert sample_run(run, 8, folder, part=(0, 1), **JOB) == folder and files(folder) == whole


def test_while_another_writes_the_npz(run, tmp_path):
    from dmp_wb.store.checkpoints import run_lock
    (tmp_path / "out").mkdir()
    with run_lock(tmp_path / "out"): assert sample_run(run, 2, tmp_path / "out", **FAST) is None
    assert sample_run(run, 2, tmp_path / "out", **FAST) and len(array(tmp_path / "out")) == 2


def test_without_an_npz(run, tmp_path):
    assert sample_run(run, 2, tmp_path / "out", npz=False, **FAST) and not (tmp_path / "out" / SAMPLES_FILE).exists()
    assert sample_run(run, 2, tmp_path / "out", **FAST) and len(array(tmp_path / "out")) == 2


def test_progress_counts_images(run, tmp_path, monkeypatch):
    bars, shown = [], []
    monkeypatch.setattr(
        sample_files, "progress",
        lambda **kw: (bars.append(wb.core.bars.progress(**kw)), shown.append(not bars[-1].disable), bars[-1])[-1])
    sample_run(run, 8, tmp_path / "out", batch_size=3, num_inference_steps=3, device="cpu")
    assert (bars[0].initial, bars[0].n, bars[0].total) == (0, 8, 8)
    (tmp_path / "out" / "000007.png").unlink()
    sample_run(run, 8, tmp_path / "out", part=(0, 2), batch_size=3, num_inference_steps=3, device="cpu")
    # batches 0 and 2 are its own, and the last was torn
    assert (bars[1].initial, bars[1].n, bars[1].total) == (3, 5, 5)
    sample_run(run, 8, tmp_path / "out", part=(1, 2), batch_size=3, num_inference_steps=3, device="cpu")
    assert shown == [True, True, False]


# --- latents

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in "ab":
        (root / "images" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(
                root / "images" / name / f"{i}.png")
    for seed, name in ((0, "vae"), (1, "other")):
        torch.manual_seed(seed)
        AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                      block_out_channels=[8, 8], norm_num_groups=4, sample_size=16).save_pretrained(root / name)
    return root


@pytest.mark.parametrize("cached", [False, True])
def test_latents_are_decoded(cached, photos, tmp_path):
    data = DataConfig(name=str(photos / "images"), size=16, vae=str(photos / "vae"), num_workers=0)
    coder = wb.data.encoders.load_vae(str(photos / "vae"))
    if cached:
        write_cache(data, tmp_path / "cache")
        data = DataConfig(name=str(tmp_path / "cache"))
    model = tiny_dit(in_channels=4, out_channels=8, num_classes=2)
    run = make_run(tmp_path / "run", model, data=data)
    folder = sample_run(run, 3, **FAST)
    with torch.no_grad():
        want = coder.decode(wb.sample(model, 3, num_inference_steps=3, quiet=True, clamp=False))
    assert array(folder).shape == (3, 16, 16, 3) and np.array_equal(
        array(folder), ((want + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    with pytest.raises(BadInput, match="vae is '[0-9a-f]{16}' there and"):
        sample_run(run, 3, vae=str(photos / "other"), **FAST)
    other = sample_run(run, 3, tmp_path / "other", vae=str(photos / "other"), **FAST)
    assert not np.array_equal(array(other), array(folder))


def test_latents_whose_vae_is_gone(photos, tmp_path):
    run = make_run(tmp_path / "run", tiny_dit(in_channels=4, num_classes=2),
                   data=DataConfig(name=str(tmp_path / "gone"), size=16))
    with pytest.raises(BadInput, match="draws 4 channels.*expected vae"): sample_run(run, 2, **FAST)
    assert array(sample_run(run, 2, vae=str(photos / "vae"), **FAST)).shape == (2, 16, 16, 3)


# --- what is refused

@pytest.mark.parametrize("change,match", [
    (dict(seed=1), "seed is 0 there and 1 here"),
    (dict(guidance_scale=2.0), "guidance_scale is 1.5 there and 2.0 here"),
    (dict(sampler="ddim"), "sampler is 'dpmsolver\+\+' there and 'ddim' here"),
    (dict(batch_size=2), "batch_size is 64 there and 2 here"),
    (dict(num_inference_steps=4), "num_inference_steps is 3 there and 4 here"),
    (dict(class_labels=[5, 5, 5]), "class_labels is 'balanced' there and"),
    (dict(num_images=4), "num_images is 3 there and 4 here"), (dict(num_images=2), "num_images is 3 there and 2"),
    (dict(guidance_interval=(0, 9)), r"guidance_interval is None there and \[0, 9\] here"),
    (dict(guidance_channels=1), "guidance_channels is None there and 1 here"),
])
def test_a_folder_of_other_images_is_refused(change, match, run, tmp_path):
    call = lambda **kw: sample_run(run, **{**dict(num_images=3, folder=tmp_path / "out"), **FAST, **kw})
    before = files(call())
    with pytest.raises(BadInput, match=match): call(**change)
    assert files(tmp_path / "out") == before and call()


def test_a_call_that_failed_before_its_first_image_binds_no_later_one(run, tmp_path, monkeypatch):
    def fail(*given): raise BadInput("caption 'x' has 99 tokens")
    with monkeypatch.context() as m:
        m.setattr(sample_files, "_draw", fail)
        with pytest.raises(BadInput, match="99 tokens"):
            sample_run(run, 2, folder=tmp_path / "s", num_inference_steps=2, npz=False, seed=1, quiet=True)
    assert os.listdir(tmp_path / "s") == [sample_files.SAMPLES_PLAN]
    sample_run(run, 2, folder=tmp_path / "s", num_inference_steps=2, npz=False, seed=2, quiet=True)
    assert json.loads((tmp_path / "s" / sample_files.SAMPLES_PLAN).read_text())["seed"] == 2


def test_another_model_is_refused(run, tmp_path):
    before = files(sample_run(run, 2, tmp_path / "out", **FAST))
    make_run(run, randomise(tiny_dit(out_channels=2), seed=7))
    with pytest.raises(BadInput, match="model is '[0-9a-f]{16}' there"): sample_run(run, 2, tmp_path / "out", **FAST)
    assert files(tmp_path / "out") == before


def test_routing_is_part_of_the_plan(run, tmp_path):
    a = sample_run(run, 2, tmp_path / "out", **FAST)
    make_run(run, tiny_dit(out_channels=2), routing=wb.DTRConfig(sharing_ratio=0.5))
    with pytest.raises(BadInput, match=r"routing is None there and \{'sharing_ratio': 0.5"):
        sample_run(run, 2, tmp_path / "out", **FAST)
    assert not np.array_equal(array(sample_run(run, 2, tmp_path / "routed", **FAST)), array(a))


@pytest.mark.parametrize("content,match",
                         [("[]", "images of something else"), ("{}", "format is None there and 1 here"),
                          ("{", "not valid JSON"), (None, "holds images, but no sampling.json")])
def test_a_folder_that_says_nothing(content, match, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "000000.png").write_bytes(b"somebody's")
    if content: (tmp_path / "out" / SAMPLES_PLAN).write_text(content)
    with pytest.raises(BadInput, match=match): sample_run(run, 2, tmp_path / "out", **FAST)
    assert (tmp_path / "out" / "000000.png").read_bytes() == b"somebody's"
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file: expected a folder"): sample_run(run, 2, tmp_path / "file", **FAST)


def test_a_damaged_image_is_named(run, tmp_path):
    folder = sample_run(run, 3, **FAST)
    want = files(folder)
    (folder / SAMPLES_FILE).unlink()
    (folder / "000001.png").write_bytes((folder / "000001.png").read_bytes()[:40])
    with pytest.raises(BadInput, match="000001.png is .*: remove it and sample again"): sample_run(run, 3, **FAST)
    assert SAMPLES_FILE not in files(folder) and not list(folder.glob(".*.tmp"))
    (folder / "000001.png").unlink()
    sample_run(run, 3, **FAST)
    assert files(folder) == want


@pytest.mark.parametrize("wrong,match", [
    (dict(num_images=0), "num_images is 0"), (dict(num_images=-1), "num_images is -1"),
    (dict(batch_size=0), "batch_size is 0"), (dict(guidance_scale=-1), "guidance_scale is -1"),
    (dict(sampler="dpm"), "did you mean 'ddpm'"),
    (dict(class_labels=[1, 2]), "2 class_labels for 3 images"),
    (dict(class_labels=[1, 2, 10]), "class label 10 is out of range"),
    (dict(class_labels="balancd"), "class_labels is 'balancd': expected balanced, or a text file"),
    (dict(num_inference_steps=0), "num_inference_steps is 0"), (dict(guidance_interval=(9, 1)), "lower one first"),
    (dict(guidance_channels=3), "guidance_channels is 3"), (dict(part=(2, 2)), r"part is \(2, 2\)"),
    (dict(part=(-1, 2)), "part is"),
    (dict(sampler="flow-euler"), "flow-euler with flow_prediction"), (dict(vae="/no/where"), "data.vae is '/no/where'"),
    (dict(run="no-such-run"), "unknown run"),
])
def test_bad_input_writes_nothing(wrong, match, run, tmp_path):
    with pytest.raises(BadInput, match=match) as e:
        sample_run(**{**dict(run=run, num_images=3, folder=tmp_path / "out"), **FAST, **wrong})
    assert not (tmp_path / "out").exists() and "\n" not in str(e.value)


def test_labels_files_that_are_wrong(run, tmp_path):
    (tmp_path / "words.txt").write_text("1 two 3")
    (tmp_path / "short.txt").write_text("1 2")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "far.txt").write_text("1 2 11")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe 1 2")
    for name, match in (("words", "holds 'two'"), ("short", "2 class_labels for 3"), ("empty", "0 class_labels for 3"),
                        ("far", "class label 11"), ("binary", "holds")):
        with pytest.raises(BadInput, match=match):
            sample_run(run, 3, tmp_path / "out", tmp_path / f"{name}.txt", **FAST)
    with pytest.raises(MissingFile): sample_run(run, 3, tmp_path / "out", tmp_path / "none.txt", **FAST)


def test_a_run_without_a_model(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(wb.Experiment(name="run", model=wb.ModelConfig("DiT-S/2"))))
    with pytest.raises(BadInput, match="holds no model yet"): sample_run(tmp_path / "run", 2, **FAST)
    assert not (tmp_path / "run" / "samples").exists()


def test_a_model_that_has_diverged(tmp_path):
    model = tiny_dit()
    with torch.no_grad(): model.final_layer.linear.bias.fill_(float("nan"))
    with pytest.raises(BadInput, match="image 0 is not finite"):
        sample_run(make_run(tmp_path / "run", model), 2, tmp_path / "out", **FAST)
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_model_of_text_needs_captions(run, tmp_path):
    unet = UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8),
                                layers_per_block=1, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    with pytest.raises(BadInput, match="a UNet2DConditionModel, is conditioned on text, but its data have no captions"):
        sample_run(make_run(tmp_path / "unet", unet), 2, **FAST)
    with pytest.raises(BadInput, match="captions were given, but the model, a DiT, takes no text"):
        sample_run(run, 2, captions=["a three"], **FAST)


def test_the_plan_says_what_the_images_are(run, tmp_path):
    sample_run(run, 3, tmp_path / "out", guidance_interval=(10, 900), **FAST)
    plan = json.loads((tmp_path / "out" / SAMPLES_PLAN).read_text())
    assert {k: plan[k] for k in ("run", "num_images", "class_labels", "sampler", "num_inference_steps",
                                 "guidance_scale", "guidance_interval", "seed", "batch_size", "vae")} == dict(
                                     run="run", num_images=3, class_labels="balanced", sampler="dpmsolver++",
                                     num_inference_steps=3, guidance_scale=1.5, guidance_interval=[10, 900], seed=0,
                                     batch_size=64, vae=None)


# --- what goes wrong underneath

def test_a_folder_that_is_renamed_meanwhile_is_a_failure(run, tmp_path, monkeypatch):
    folder, write = tmp_path / "out", sample_files._write_png
    def move(where, number, array):
        if number == 4: folder.rename(tmp_path / "elsewhere")
        write(where, number, array)
    monkeypatch.setattr(sample_files, "_write_png", move)
    with pytest.raises(BadInput, match="out cannot be written: it was renamed or removed meanwhile"):
        sample_run(run, 8, folder, batch_size=4, part=(0, 1), **FAST)
    assert not folder.exists() and (tmp_path / "elsewhere" / "000003.png").exists()


@pytest.mark.parametrize("part", [(0, 1), (0, 2)])
def test_images_that_are_missing_at_the_end_are_a_failure(part, run, tmp_path, monkeypatch):
    write = sample_files._write_png
    monkeypatch.setattr(sample_files, "_write_png",
                        lambda folder, i, array: None if i == 1 else write(folder, i, array))
    with pytest.raises(BadInput, match="1 of the images that were written to .*out are gone, first 000001.png"):
        sample_run(run, 4, tmp_path / "out", batch_size=2, part=part, **FAST)


@pytest.mark.parametrize("where", ["write_json", "write_atomic", "_write_npz"])
def test_a_full_disk_is_one_line_and_goes_on_when_there_is_room(where, run, tmp_path, monkeypatch):
    def full(*args): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(sample_files, where, full)
        with pytest.raises(BadInput, match="out cannot be written: No space left on device") as e:
            sample_run(run, 4, tmp_path / "out", batch_size=2, **FAST)
    assert "\n" not in str(e.value) and not list(tmp_path.glob("out/.*.tmp"))
    assert files(sample_run(run, 4, tmp_path / "out", batch_size=2, **FAST)) == files(
        sample_run(run, 4, tmp_path / "other", batch_size=2, **FAST))


def test_an_image_of_another_size_does_not_end_in_the_npz(run, tmp_path):
    sample_run(run, 3, tmp_path / "out", npz=False, **FAST)
    Image.new("L", (9, 8)).save(tmp_path / "out" / "000002.png")
    with pytest.raises(BadInput, match="000002.png is 8 × 9: expected 8 × 8, as the others"):
        sample_run(run, 3, tmp_path / "out", **FAST)


def test_latents_that_decode_to_nothing_finite_are_no_image():
    walk = diffusion_sampling._Walk(tiny_dit(), SamplingConfig(), 2)
    with pytest.raises(BadInput, match="image 1 is not finite: its latents are, and what the VAE makes of them is not"):
        sample_files._pixels(torch.zeros(2, 1, 8, 8), lambda z: torch.stack([z[0], z[1] / 0]), range(2), walk)


@pytest.mark.parametrize(
    "wrong", [dict(num_images=2.0), dict(seed=None), dict(guidance_scale="2"), dict(batch_size="8"), dict(part=3),
              dict(part=("a", 2)), dict(part=(0, 1, 2)), dict(npz="no"), dict(patched=None),
              dict(quiet=1), dict(run=3), dict(run=None), dict(folder=3), dict(vae=3), dict(device="cdua"),
              dict(device="cuda:0"), dict(device=None), dict(guidance_channels=1.5), dict(class_labels=3.5)], ids=str)
def test_an_argument_of_another_type_is_one_line_and_writes_nothing(wrong, run, tmp_path):
    with pytest.raises(BadInput) as e:
        sample_run(**{"run": run, "num_images": 2, "folder": tmp_path / "out", **FAST, **wrong})
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_each_process_of_a_launcher_takes_its_own_gpu(monkeypatch):
    from dmp_wb.store.run import usual_device
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    for rank, device in (("0", "cuda:0"), ("3", "cuda:3"), ("5", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert usual_device() == torch.device(device)
    monkeypatch.delenv("LOCAL_RANK")
    assert usual_device() == torch.device("cuda")
    with pytest.raises(BadInput, match="device is 'cuda:4': expected cuda:0 to cuda:3"): usual_device("cuda:4")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties processes to their parent")
def test_children_die_with_their_parent(tmp_path):
    "Those of --num-processes, however the parent ends."
    import signal
    import subprocess
    import time
    import psutil
    (tmp_path / "dmp_wb").mkdir()   # what stands for the command line: it takes no second to start, and does not end
    (tmp_path / "dmp_wb" / "__init__.py").write_text("")
    (tmp_path / "dmp_wb" / "__main__.py").write_text("import time; time.sleep(600)")
    code = "import dmp_wb.cli.making as m, os; os.environ['PYTHONPATH'] = os.getcwd(); m._in_parallel(2)"
    parent = subprocess.Popen([sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv.pop()); " + code,
                               os.path.dirname(os.path.dirname(wb.__file__))], cwd=tmp_path)
    children: list = []
    while len(children) < 2 and parent.poll() is None:
        time.sleep(0.05)
        children = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert len(children) == 2 and not psutil.wait_procs(children, timeout=20)[1]
