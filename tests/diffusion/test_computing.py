"In what numbers images are drawn: bfloat16 and float16, TF32, compiled; what is set for the process is put back."
import json

import pytest
import torch
from conftest import randomise, tiny_dit

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.core.settings import SamplingConfig
from dmp_wb.diffusion import walk as diffusion_walk
from dmp_wb.diffusion.schedules import sampler
from dmp_wb.evaluation.evaluate import guidance_sweep
from dmp_wb.evaluation.sample_files import _same_images
from dmp_wb.models import computing

FAST = dict(num_inference_steps=3, quiet=True)


def test_a_narrow_dtype_is_near_and_the_default_is_the_same_to_the_bit():
    model = wb.load_model("digits-base", device="cpu")
    wide = wb.sample(model, 3, **FAST)
    assert torch.equal(wide, wb.sample(model, 3, dtype="float32", **FAST))
    for narrow in ("bf16", "bfloat16", torch.bfloat16):
        found = wb.sample(model, 3, dtype=narrow, **FAST)
        assert found.dtype == torch.float32 and not torch.equal(found, wide)
        assert (found - wide).abs().mean() < 0.05
    assert torch.equal(wb.sample(model, 3, **FAST), wide) and not torch.is_autocast_enabled("cpu")


def test_gates_stay_in_float32(monkeypatch):
    model = tiny_dit()
    p = randomise(wb.patch(model), 0.3)
    for settings in ({}, {"dtype": "bf16"}):
        seen = []
        handle = model.register_forward_hook(lambda *a, seen=seen: seen.append(p.last_gates))
        walk = list(wb.sample_trajectory(model, 2, num_inference_steps=3, **settings))
        handle.remove()
        assert len(walk) == 4 and all(g.dtype == torch.float32 for g in seen)
        assert torch.equal(seen[0], p.gates([999]))


def test_between_the_steps_of_a_narrow_walk_nothing_is_set():
    for step in wb.sample_trajectory(tiny_dit(), 2, num_inference_steps=3, dtype="bf16"):
        assert not torch.is_autocast_enabled("cpu") and step.pred_x0.dtype == torch.float32


def test_tf32_is_put_back(monkeypatch):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with pytest.raises(ZeroDivisionError), computing.computing(torch.device("cuda"), tf32=True):
        assert torch.get_float32_matmul_precision() == "high"
        assert computing.multiplies_in_tf32(torch.device("cuda"))
        assert not computing.multiplies_in_tf32(torch.device("cpu"))
        _ = 1 / 0
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    model = tiny_dit()
    assert torch.equal(wb.sample(model, 2, tf32=True, **FAST), wb.sample(model, 2, **FAST))   # a CPU has none


def test_compile_calls_the_compiled_model(monkeypatch):
    model, made = tiny_dit(), []
    monkeypatch.setattr(computing, "missing_compiler", lambda device_type: None)
    monkeypatch.setattr(torch, "compile", lambda m: (made.append(m), m)[1])
    assert torch.equal(wb.sample(model, 2, compile=True, **FAST), wb.sample(model, 2, **FAST)) and made == [model]


@pytest.mark.parametrize("wrong,match", [
    (dict(dtype="bf61"), "unknown dtype 'bf61'"), (dict(dtype=None), "unknown dtype"),
    (dict(dtype=torch.float64), "unknown dtype 'float64'"), (dict(tf32="yes"), "tf32 is 'yes'"),
    (dict(compile=1), "compile is 1")])
def test_a_wrong_setting_is_one_line(wrong, match):
    with pytest.raises(BadInput, match=match) as e: wb.sample(tiny_dit(), 2, **FAST, **wrong)
    assert "\n" not in str(e.value)


def test_what_the_machine_lacks_is_one_line_that_names_the_option(monkeypatch):
    monkeypatch.setattr(computing, "computes_in", lambda device, dtype: dtype == "float32")
    with pytest.raises(BadInput, match="dtype is bfloat16, which this cpu device does not compute in: .* float32$"):
        wb.sample(tiny_dit(), 2, dtype="bf16", **FAST)
    for name in ("CXX", "CC"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(computing.shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match=r"compile is true, but there is no C\+\+ compiler"):
        wb.sample(tiny_dit(), 2, compile=True, **FAST)


def test_a_folder_of_samples_is_not_completed_in_other_numbers(tmp_path):
    usual = {"num_images": 3, "dtype": "float32", "tf32": False, "compile": False}
    _same_images(tmp_path / "out", usual)
    (tmp_path / "out" / "000000.png").touch()   # a folder without images is bound to nothing yet
    _same_images(tmp_path / "out", usual)
    with pytest.raises(BadInput, match="dtype is 'float32' there and 'bfloat16' here"):
        _same_images(tmp_path / "out", {**usual, "dtype": "bfloat16"})
    (tmp_path / "out" / "sampling.json").write_text(json.dumps({"num_images": 3}))   # of an older version
    _same_images(tmp_path / "out", usual)
    with pytest.raises(BadInput, match="compile is False there and True here"):
        _same_images(tmp_path / "out", {**usual, "compile": True})


def test_a_row_of_figures_names_what_is_not_usual():
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sweep = lambda **how: guidance_sweep(tiny_dit(), [1.0], 20, images, metrics="fid", num_inference_steps=2,
                                         quiet=True, cache=False, **how)[0]
    assert "settings" not in sweep() and sweep(dtype="bf16")["settings"] == {"dtype": "bfloat16"}


@pytest.mark.parametrize("steps", [1, 4, 50, 1000])
def test_a_move_of_ddim_is_diffusers_step_to_the_bit(steps):
    for schedule in ("linear", "cosine"):
        scheduler, g = sampler("ddim", schedule, steps), torch.Generator().manual_seed(0)
        moves = diffusion_walk._ddim_moves(scheduler)
        for i in {0, steps // 2, steps - 1}:
            x, noise = torch.randn(2, 3, 5, 5, generator=g), torch.randn(2, 3, 5, 5, generator=g)
            assert torch.equal(moves[i](x, noise), scheduler.step(noise, scheduler.timesteps[i], x).prev_sample)
    assert diffusion_walk._ddim_moves(sampler("ddim", num_inference_steps=4, clip_sample=True)) is None
    assert diffusion_walk._ddim_moves(sampler("ddpm", num_inference_steps=4)) is None


def test_modules_are_scanned_once_and_x0_is_for_those_who_look(monkeypatch):
    model, scans, seen = tiny_dit(), [], []
    modules, x0 = type(model).modules, diffusion_walk.predicted_x0
    monkeypatch.setattr(type(model), "modules", lambda self, *a, **kw: (scans.append(1), modules(self, *a, **kw))[1])
    monkeypatch.setattr(diffusion_walk, "predicted_x0", lambda *a: (seen.append(1), x0(*a))[1])
    counts = []
    for n in (4, 20):
        scans.clear()
        wb.sample(model, 2, num_inference_steps=n, quiet=True)
        counts.append(len(scans))
    assert counts[0] == counts[1] and not seen
    wb.sample(model, 2, num_inference_steps=5, quiet=True, keep=[1, 3])
    assert len(seen) == 2
    assert len(list(wb.sample_trajectory(model, 2, num_inference_steps=5))) == 6 and len(seen) == 7


def test_settings_of_one_config_reach_every_way_of_drawing():
    config = SamplingConfig(dtype="bf16", num_inference_steps=2)
    assert config.check().dtype == "bfloat16"
    model = tiny_dit()
    assert torch.equal(wb.sample(model, 2, config=config, quiet=True),
                       wb.sample(model, 2, num_inference_steps=2, dtype="bf16", quiet=True))
