"""Several processes: DDP, and FSDP2 through accelerate's config files, against one process.
On CPUs by gloo, where torch shards as it does on GPUs."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from safetensors.torch import load_file

import dmp_wb as wb
from dmp_wb.store.checkpoints import load_checkpoint, newest_checkpoint
from dmp_wb.store.run import Run

SMALL = ["train.batch_size=32", "train.steps=12", "train.log_every=2", "train.checkpoint_every=4"]
PRETRAIN = ["digits-quick", "model.hidden_size=32", "model.num_layers=2", "model.num_attention_heads=2", *SMALL]
FSDP = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_transformer_layer_cls_to_wrap": "DiTBlock", "fsdp_reshard_after_forward": True,
        "fsdp_offload_params": False, "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True, "fsdp_activation_checkpointing": False}

WORKER = '''
import gc, json, os, sys, weakref
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
import dmp_wb.training.loop as loop
from dmp_wb.training.__main__ import main

inner, append_row = Accelerator.prepare, loop.append_row

def prepare(self, backbone, optimizer):
    given = [weakref.ref(p) for p in backbone.parameters()]
    model, optimizer = inner(self, backbone, optimizer)
    gc.collect()
    now = {id(p) for p in model.parameters()}
    found = {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters()),
             "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
             "here": sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters()),
             "left": sum(r() is not None and id(r()) not in now for r in given)}
    if hasattr(model, "_get_ddp_logging_data"):
        kept = ("num_parameter_tensors", "total_parameter_size_bytes", "broadcast_buffers")
        found["ddp"] = {k: v for k, v in model._get_ddp_logging_data().items() if k in kept}
    if self.is_main_process: open(os.environ["FOUND"], "w").write(json.dumps(found))
    return model, optimizer

def die(run, row):
    if row["step"] == int(os.environ.get("DIE_AT", -1)): os._exit(9)
    append_row(run, row)

Accelerator.prepare, loop.append_row = prepare, die
main(sys.argv[1:])
'''


def launch(tmp_path, name, *arguments, fsdp=None, zero_stage=None, die_at=-1, fails=False):
    "Train on two processes; the run and what accelerate made of the model, or what was printed if it fails."
    worker, found = tmp_path / "worker.py", tmp_path / f"{name}.json"
    worker.write_text(WORKER)
    if zero_stage:
        ClusterConfig(compute_environment="LOCAL_MACHINE", distributed_type="DEEPSPEED", mixed_precision="no",
                      use_cpu=False, debug=False, num_processes=2,
                      deepspeed_config={"zero_stage": zero_stage}).to_yaml_file(tmp_path / "accelerate.yaml")
        command = ["accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml"),
                   "--main_process_port", "29533"]
    elif fsdp is None: command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    else:
        ClusterConfig(compute_environment="LOCAL_MACHINE", distributed_type="FSDP", mixed_precision="no", use_cpu=False,
                      debug=False, num_processes=2,
                      fsdp_config={**FSDP, **fsdp}).to_yaml_file(tmp_path / "accelerate.yaml")
        command = ["accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml"),
                   "--main_process_port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "FOUND": str(found), "DIE_AT": str(die_at),
           **({"DS_ACCELERATOR": "cpu"} if zero_stage else {})}
    done = subprocess.run([sys.executable, "-m", *command, str(worker), *arguments, "--folder", str(tmp_path / name)],
                          env=env, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr if fails else (Run(tmp_path / name), json.loads(found.read_text()))


@pytest.fixture(scope="module")
def base(tmp_path_factory): return wb.train(PRETRAIN[0], PRETRAIN[1:], folder=tmp_path_factory.mktemp("scale") / "one")


def dmp(base, *extra): return ["digits-dmp", f"base={base.folder}", *SMALL, *extra]


@pytest.fixture(scope="module")
def sharded(base, tmp_path_factory):
    "Whole runs on two processes under FSDP2."
    return {method: launch(tmp_path_factory.mktemp("scale"), method, *arguments(method, base), fsdp={})
            for method in ("pretrain", "dmp")}


def arguments(method, base):   # the balance loss of DMP is of a process's own part of the batch
    return PRETRAIN if method == "pretrain" else dmp(base, "patch.importance_weight=0", "optim.max_grad_norm=1",
                                                     "train.sample_every=12", "train.sample_images=4")


def exported(run):
    files = [*run.folder.glob("model/*.safetensors"), *run.folder.glob("patch/*.safetensors")]
    return load_file(files[0])


def far(a, b):
    "The largest difference of exported weights."
    a, b = exported(a), exported(b)
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def curves(a, b, keys=("loss", "grad_norm"), rel=1e-5):
    assert a.metrics()["step"] == b.metrics()["step"]
    for key in keys: assert a.metrics()[key] == pytest.approx(b.metrics()[key], rel=rel), key


def same(a, b):
    "Metrics, exported weights and the newest checkpoint, to the bit."
    curves(a, b, [k for k in a.metrics() if k not in ("images_per_second", "memory_gib")], rel=0)
    x, y = (load_checkpoint(newest_checkpoint(r.folder)) for r in (a, b))
    assert far(a, b) == 0 and all(torch.equal(x["model"][k], y["model"][k]) for k in x["model"])
    assert all(torch.equal(p, q) for p, q in zip(x["ema"]["shadow_params"], y["ema"]["shadow_params"], strict=True))
    assert all(torch.equal(s[k], y["optimizer"]["state"][i][k]) for i, s in x["optimizer"]["state"].items() for k in s)


def test_fsdp_pretrains_as_one_process(base, sharded):
    two, found = sharded["pretrain"]
    # nothing holds on to the whole weights
    assert found["class"] == "FSDPDiT" and found["sharded"] and found["left"] == 0
    assert found["here"] < 0.55 * found["parameters"]
    curves(two, base)
    assert far(two, base) < 2e-5
    assert (two.folder / "model" / "config.json").read_text() == (base.folder / "model" / "config.json").read_text()
    # the files are those of one process
    x, y = (load_checkpoint(newest_checkpoint(r.folder)) for r in (two, base))
    shapes = (lambda tree: {k: shapes(v) for k, v in tree.items()} if isinstance(tree, dict)
              else [shapes(v) for v in tree] if isinstance(tree, list) else getattr(tree, "shape", None))
    # but for the sums since the last line, a row for each process
    assert x.pop("meter")["rows"].shape[0] == 2 and y.pop("meter")["rows"].shape[0] == 1
    assert shapes(x) == shapes(y)
    assert two.summary["trained_parameters"] == base.summary["trained_parameters"]


def test_only_the_patch_goes_between_processes(base, sharded, tmp_path):
    given = arguments("dmp", base)
    one = wb.train(given[0], given[1:], folder=tmp_path / "one")
    ddp, found = launch(tmp_path, "ddp", *given)
    size = sum(v.numel() for v in exported(one).values())
    assert found["ddp"] == {"num_parameter_tensors": 3, "total_parameter_size_bytes": 4 * size,
                            "broadcast_buffers": 0} and size < 0.1 * found["parameters"]
    fsdp, found = sharded["dmp"]
    assert found["sharded"] and found["left"] == 0 and found["here"] < 0.55 * found["parameters"]
    for two in (ddp, fsdp):
        curves(two, one, rel=1e-4)
        assert far(two, one) < 1e-4
        assert ((two.folder / "patch" / "adapter_config.json").read_text()
                == (one.folder / "patch" / "adapter_config.json").read_text())
        assert two.summary["base_fingerprint"] == one.summary["base_fingerprint"]
        # FSDP needs every process for that
        assert (two.folder / "samples" / "step-0000012.png").exists()
        wb.load_model(two.folder)
    curves(ddp, fsdp, rel=1e-6)
    assert far(ddp, fsdp) < 1e-6


@pytest.mark.parametrize("method", ["pretrain", "dmp"])
def test_fsdp_resumes_to_the_bit_and_anywhere(method, base, sharded, tmp_path):
    whole, given = sharded[method][0], arguments(method, base)
    launch(tmp_path, "broken", *given, fsdp={}, die_at=10, fails=True)
    assert newest_checkpoint(tmp_path / "broken").name == "step-0000008" and not Run(tmp_path / "broken").finished
    shutil.copytree(tmp_path / "broken", tmp_path / "moved")
    same(whole, launch(tmp_path, "broken", *given, fsdp={})[0])
    # a checkpoint of two processes, on one
    moved = wb.train(given[0], given[1:], folder=tmp_path / "moved")
    curves(moved, whole, rel=1e-4)
    assert far(moved, whole) < 1e-4


@pytest.mark.parametrize("extra", [["train.gradient_accumulation_steps=4", "patch.noisy_gating=true", "patch.top_k=4"],
                                   ["train.gradient_checkpointing=true", "train.mixed_precision=bf16"],
                                   ["multitask.method=uw", "multitask.k=4", "patch.mode=prepend", "patch.num_prompts=5",
                                    "routing.sharing_ratio=0.8"]], ids=["parts", "checkpoints", "uncertainty"])
def test_fsdp_is_ddp(extra, base, tmp_path):
    ddp, _ = launch(tmp_path, "ddp", *dmp(base, *extra))
    fsdp, _ = launch(tmp_path, "fsdp", *dmp(base, *extra), fsdp={})
    curves(ddp, fsdp)
    assert far(ddp, fsdp) < 1e-5


@pytest.mark.parametrize("fsdp, extra, said",
                         [({"fsdp_version": 1}, [], "fsdp_version is 1: expected 2"),
                          ({"fsdp_activation_checkpointing": True}, [], "train.gradient_checkpointing=true"),
                          ({}, ["multitask.method=PCGrad", "multitask.k=4"], "expected 'none' or 'uw' with FSDP")])
def test_what_fsdp_cannot_do_is_said(fsdp, extra, said, tmp_path):
    assert said in launch(tmp_path, "refused", *PRETRAIN, *extra, fsdp=fsdp, fails=True)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("zero_stage", [1, 2])
@pytest.mark.parametrize("method,extra", [("pretrain", []), ("dmp", []), ("dmp", [
    "train.gradient_accumulation_steps=4", "multitask.method=uw", "multitask.k=4", "train.mixed_precision=bf16"])],
                         ids=["pretrain", "dmp", "parts"])
def test_deepspeed_is_ddp_and_resumes(zero_stage, method, extra, base, tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    given = [*arguments(method, base), *extra]
    ddp, _ = launch(tmp_path, "ddp", *given)
    whole, _ = launch(tmp_path, "zero", *given, zero_stage=zero_stage)
    curves(ddp, whole)
    assert far(ddp, whole) < 5e-5
    launch(tmp_path, "broken", *given, zero_stage=zero_stage, die_at=10, fails=True)
    shutil.copytree(tmp_path / "broken", tmp_path / "moved")
    same(whole, launch(tmp_path, "broken", *given, zero_stage=zero_stage)[0])
    # its checkpoint, without DeepSpeed
    assert far(launch(tmp_path, "moved", *given)[0], whole) < 1e-4
