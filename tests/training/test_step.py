"""The step: what it waits for, frozen weights in autocast's dtype, processes that wait for each other, what a machine
cannot do."""
import contextlib
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from backbones import BACKBONES, INPUT_SIZE, inputs_for

import dmp_wb as wb
from dmp_wb.config import TrainConfig
from dmp_wb.core.errors import BadInput
from dmp_wb.models.computing import allow_tf32, kept_precision
from dmp_wb.store.checkpoints import load_checkpoint, newest_checkpoint
from dmp_wb.store.run import Run
from dmp_wb.training import setup, state
from dmp_wb.training.distributed import await_main, WaitedTooLong
from dmp_wb.training.state import cast_alike, Frozen

SMALL = ["model.hidden_size=16", "model.num_layers=2", "model.num_attention_heads=2", "train.batch_size=16",
         "train.steps=8", "train.log_every=2", "train.checkpoint_every=3"]


def parts_of(model, precision="bf16", kind=DistributedType.NO, cast_frozen=True):
    train = TrainConfig(mixed_precision=precision, cast_frozen=cast_frozen)
    return SimpleNamespace(exp=SimpleNamespace(train=train), accelerator=SimpleNamespace(distributed_type=kind),
                           backbone=model)


def step(model, kwargs):
    "Output and gradients of what learns, under autocast."
    for p in model.parameters(): p.grad = None
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16): out = model(**kwargs).sample
    (out.float() ** 2).mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("gate_input", ["timestep", "condition"])
@pytest.mark.parametrize("name", BACKBONES)
def test_frozen_weights_in_autocast_s_dtype_give_the_same_bits(name, gate_input):
    model, kwargs = BACKBONES[name](), inputs_for(name)
    size = list(INPUT_SIZE[name]) if name in INPUT_SIZE else None
    patch = wb.patch(model, wb.DMPConfig(init="random", input_size=size, gate_input=gate_input)).train()
    before, want = {k: v.clone() for k, v in model.state_dict().items()}, step(model, kwargs)
    frozen = Frozen.of(parts_of(model))
    with frozen.narrow():
        narrow = [p for p in model.parameters() if p.dtype == torch.bfloat16]
        assert len(frozen.params) == len(narrow) > 0 and all(p.dtype == torch.float32 for p in patch.parameters())
        assert next(model.parameters()).dtype == torch.float32
        with frozen.wide(): assert {p.dtype for p in model.parameters()} == {torch.float32}
        got = step(model, kwargs)
    assert len(got) > 1 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype
                                                 for k in before)


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*.safetensors") if "checkpoints" not in str(p)}


@pytest.mark.parametrize("method", ["dmp", "tlora"])
def test_a_run_with_frozen_weights_cast_is_the_run_without(method, tmp_path):
    extra = [*SMALL, "train.mixed_precision=bf16", "train.steps=4", "train.sample_every=4", "train.sample_images=2",
             "train.sample_steps=2"]
    runs = [wb.train(wb.load_experiment(f"digits-{method}", [*extra, f"train.cast_frozen={on}"]), folder=tmp_path / on)
            for on in ("true", "false")]
    a, b = (load_checkpoint(newest_checkpoint(run.folder)) for run in runs)
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in b["model"])
    assert all(map(torch.equal, a["ema"]["shadow_params"], b["ema"]["shadow_params"]))
    assert len({(run.folder / "samples" / "step-0000004.png").read_bytes() for run in runs}) == 1
    assert runs[0].metrics()["loss"] == runs[1].metrics()["loss"] and files_of(runs[0].folder) == files_of(
        runs[1].folder)
    assert runs[0].summary["base_fingerprint"] == runs[1].summary["base_fingerprint"]
    # nothing that a figure depends on: a run may go on with the other
    longer = wb.train(wb.load_experiment(f"digits-{method}", [*extra, "train.steps=5", "train.cast_frozen=false"]),
                      folder=tmp_path / "true")
    assert longer.summary["steps"] == 5


def test_what_learns_and_what_the_gates_see_stays_float32():
    model = BACKBONES["DiTTransformer2DModel"]()
    wb.patch(model, wb.DMPConfig())
    kept = {id(p) for p in cast_alike(model)}
    names = {n for n, p in model.named_parameters() if id(p) in kept}
    assert names and not any(p.requires_grad for p in model.parameters() if id(p) in kept)
    assert not any(n.startswith("transformer_blocks.0.norm1.emb.") for n in names)   # e_t comes from there
    assert any(n.startswith("transformer_blocks.1.ff.") for n in names)


@pytest.mark.parametrize("change", [{"precision": "no"}, {"cast_frozen": False}, {"kind": DistributedType.FSDP},
                                    {"kind": DistributedType.DEEPSPEED}])
def test_without_autocast_or_where_weights_are_split_nothing_is_cast(change):
    model = BACKBONES["DiT"]()
    wb.patch(model, wb.DMPConfig())
    with Frozen.of(parts_of(model, **change)).narrow() as frozen:
        assert frozen.params == [] and {p.dtype for p in model.parameters()} == {torch.float32}


# --- one wait

@pytest.mark.parametrize("bad", [[], [0], [3, 4, 7]])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_asking_one_step_later_changes_no_figure(bad, policy, tmp_path, monkeypatch):
    if policy == "rollback" and bad: bad = [4]
    extra = [*SMALL, f"train.on_nonfinite={policy}", "train.log_every=4", "train.nonfinite_limit=3"]
    runs = []
    for name, itself in (("late", state.TrainState.skips_by_itself), ("at-once", property(lambda self: False))):
        monkeypatch.setattr(state.TrainState, "skips_by_itself", itself)
        poison(monkeypatch, bad, times=1 if policy == "rollback" else 99)
        runs.append(wb.train(wb.load_experiment("digits-dmp", extra), folder=tmp_path / name))
        monkeypatch.undo()
    a, b = (load_checkpoint(newest_checkpoint(run.folder)) for run in runs)
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in b["model"])
    assert all(map(torch.equal, a["ema"]["shadow_params"], b["ema"]["shadow_params"]))
    for key in a["optimizer"]["state"]:
        assert all(torch.equal(v, b["optimizer"]["state"][key][k]) for k, v in a["optimizer"]["state"][key].items())
    same = [k for k in runs[0].metrics() if k not in ("images_per_second", "memory_gib")]
    assert all(runs[0].metrics()[k] == runs[1].metrics()[k] for k in same)


def poison(monkeypatch, steps, times):
    "The images of these steps become infinite, so many times each."
    from dmp_wb.training import batches
    original, left = batches.draw_batch, dict.fromkeys(steps, times)

    def draw(exp, data, order, step, *args, **kwargs):
        batch = original(exp, data, order, step, *args, **kwargs)
        if not left.get(step): return batch
        left[step] -= 1
        return batch | {"images": batch["images"] * float("inf")}
    monkeypatch.setattr(batches, "draw_batch", draw)


def test_a_fused_optimiser_that_is_told_of_a_bad_gradient_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(3))
    inner = torch.optim.AdamW([weight], lr=0.1, fused=True)
    it = SimpleNamespace(optimizer=inner, accelerator=SimpleNamespace(scaler=None, distributed_type=DistributedType.NO))
    assert state.TrainState.skips_by_itself.fget(it)
    for grad, bad in ((1.0, 0.0), (float("nan"), 1.0)):
        weight.grad = torch.full((3,), grad)
        before = weight.detach().clone(), {k: v.clone() for k, v in inner.state.get(weight, {}).items()}
        state.TrainState.step_optimizer(it, torch.tensor(bad))
    assert torch.equal(weight, before[0]) and all(torch.equal(v, inner.state[weight][k]) for k, v in before[1].items())
    assert inner.state[weight]["step"] == 1


@pytest.mark.parametrize("change", [{"scaler": object()}, {"distributed_type": DistributedType.FSDP},
                                    {"distributed_type": DistributedType.DEEPSPEED}])
def test_others_are_asked_before_they_step(change):
    accelerator = SimpleNamespace(**{"scaler": None, "distributed_type": DistributedType.NO, **change})
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], fused=True)
    assert not state.TrainState.skips_by_itself.fget(SimpleNamespace(optimizer=optimizer, accelerator=accelerator))


# --- processes

def test_processes_wait_for_the_first_one_and_say_what_it_was_that_took_too_long(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    first, other = (SimpleNamespace(num_processes=2, is_main_process=main) for main in (True, False))
    await_main(SimpleNamespace(num_processes=1), "a grid", 1)
    await_main(first, "the checkpoint of step 3", 1)
    await_main(other, "the checkpoint of step 3", 1)
    with pytest.raises(WaitedTooLong, match="train.timeout_minutes is 0.001, and process 0 took longer for the grid of "
                                            "samples of step 4"):
        await_main(other, "the grid of samples of step 4", 0.001)


def test_the_others_end_with_one_line_where_a_grid_takes_too_long(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("import sys, time\nfrom dmp_wb.training import loop\nfrom dmp_wb.training.__main__ import main\n"
                      "loop.write_samples = lambda *args, **more: time.sleep(60)\nmain(sys.argv[1:])\n")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port),
           "MASTER_ADDR": "127.0.0.1"}
    settings = [*SMALL, "train.sample_every=1", "train.timeout_minutes=0.1", "train.log_with=null"]
    first, other = (subprocess.Popen(
        [sys.executable, str(worker), "digits-quick", *settings, "--folder", str(tmp_path / "run")],
        env={**env, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True) for rank in "01")
    try:
        said = other.communicate(timeout=300)[1]
        assert other.returncode == 2 and ("error in process 1: train.timeout_minutes is 0.1, and process 0 took longer "
                                          "for the grid of samples of step 1 of ") in said
    finally:
        for process in (first, other):
            process.kill()
            process.communicate()


def test_gradients_are_views_of_the_buckets_that_are_sent(tmp_path):
    accelerator = setup.make_accelerator(wb.load_experiment("digits-quick", ["train.log_with=null"]),
                                         Run(tmp_path))
    assert accelerator.ddp_handler.gradient_as_bucket_view and not accelerator.ddp_handler.broadcast_buffers


# --- what a machine cannot do

def test_float32_products_are_as_before_after_a_training():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for error in (None, ValueError):
        with contextlib.suppress(ValueError), kept_precision():
            allow_tf32(before[0] == "highest")
            if error: raise error
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_a_dtype_that_the_device_lacks_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(BadInput, match="^train.mixed_precision is 'bf16', which a Tesla T4 does not compute in: "
                                       "expected 'fp16' or 'no'$"):
        setup.check_device(TrainConfig(mixed_precision="bf16"), "cuda")
    setup.check_device(TrainConfig(mixed_precision="fp16"), "cuda")


@pytest.mark.parametrize("device,said", [("cpu", r"C\+\+ compiler"), ("cuda", "C compiler|package triton")])
def test_compile_without_a_compiler_is_one_line(device, said, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match=rf"^train.compile is true, but there is no ({said}).*: expected one, or "
                                       "train.compile=false$"):
        setup.check_device(TrainConfig(compile=True), device)
    if device == "cpu":
        with pytest.raises(BadInput, match="train.compile is true"):
            wb.train("digits-quick", [*SMALL, "train.compile=true"], folder=tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["0", "-1", "100000000"])
def test_a_timeout_that_makes_no_sense_is_refused(value):
    with pytest.raises(BadInput, match="train.timeout_minutes is"):
        wb.load_experiment("digits-quick", [f"train.timeout_minutes={value}"])
