"Whether everything gives on the device what it gives on a CPU."
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import dmp_wb as wb
from benchmarks import reference
from dmp_wb.diffusion.objectives import make_tables
from dmp_wb.evaluation import extractors, features
from dmp_wb.store.checkpoints import load_checkpoint, newest_checkpoint

from .device import Device, Skip

TINY = dict(sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=4, num_classes=10)
SMALL = dict(sample_size=32, hidden_size=384, num_layers=4, num_attention_heads=6, num_classes=1000)
QUIET = ["train.log_with=null", "train.log_every=1", "train.tf32=false", "data.num_workers=0"]


def randomised(module: nn.Module, std: float = 0.05) -> nn.Module:
    "Nothing is hidden behind a weight of zero."
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters(): p.copy_(torch.randn(p.shape, generator=g) * std)
    return module


def model_of(here, method: str = "", **settings) -> nn.Module:
    model = randomised(wb.DiT(in_channels=4, out_channels=8, **(TINY if here.tiny else SMALL))).eval()
    if method == "dmp": randomised(wb.patch(model, wb.DMPConfig(**settings)))
    if method == "dtr": wb.route(model, wb.DTRConfig(**settings))
    return model


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> float:
    "The largest difference, as a share of the largest value; an error where it is beyond the tolerance."
    a, b = (torch.as_tensor(v).detach().double().cpu() for v in (found, expected))
    if a.shape != b.shape: raise AssertionError(f"{what}: shape {tuple(a.shape)}, expected {tuple(b.shape)}")
    off = float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
    if not off <= tolerance:
        raise AssertionError(f"{what} differ by {off:.2g} of the largest: expected ≤ {tolerance:g}")
    return off


def batch_of(here, count: int = 4):
    side, classes = (8, 10) if here.tiny else (32, 1000)
    x, y = reference.latents(count, side, classes=classes)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return x, y, torch.tensor([0, 250, 500, 999])[:count], noise


def loss_of(model: nn.Module, x, y, t, noise) -> torch.Tensor:
    tables = make_tables().to(x.device)
    output = model(tables.add_noise(x, noise, t), timestep=t, class_labels=y).sample
    loss = wb.diffusion_losses(output, x, noise, t, tables)["loss"].mean()
    patch = wb.get_patch(model) if hasattr(model, "dmp") else None
    return loss if patch is None else loss + patch.balance_loss()


def losses(here) -> dict:
    "Losses and gradients in float32 on the device, on the CPU, and by the plain reference loop."
    kinds = {"pretrain": ("", {}), "dtr": ("dtr", {}), "dmp": ("dmp", {}),
             "dmp, gate by condition": ("dmp", {"gate_input": "condition"}),
             "dmp, top k": ("dmp", {"top_k": 4}), "dmp, prepend": ("dmp", {"mode": "prepend", "num_prompts": 8})}
    found, batch = {}, batch_of(here)
    for name, (method, settings) in kinds.items():
        model = model_of(here, method, **settings).train()
        expected = loss_of(model, *batch)
        expected.backward()
        grads = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        on = model.to(here.device)
        there = [v.to(here.device) for v in batch]
        loss = loss_of(on, *there)
        loss.backward()
        found[name] = near(loss, expected, 1e-4, f"losses of {name}")
        there_grads = [p.grad.norm().cpu() for p in on.parameters() if p.grad is not None]
        near(torch.stack(there_grads), torch.stack(grads), 1e-3, f"gradients of {name}")
        if settings.get("mode") == "prepend" or "top_k" in settings: continue
        plain = reference.Loop(on, method or "pretrain", here.device)
        near(plain.loss(*there)[0], expected, 1e-4, f"the plain loop's loss of {name}")
    return {"largest difference": max(found.values())}


def gates_and_masks(here) -> dict:
    "Gates of all timesteps, with and without a table, and the masks of all widths."
    t, model = torch.arange(0, 1000, 7 if here.tiny else 1), model_of(here, "dmp")
    expected = wb.get_patch(model).gates(t)
    patch = wb.get_patch(model.to(here.device))
    off = near(patch.gates(t), expected, 1e-4, "gates")
    for where in (t, t.to(here.device)): near(patch.gates(where), expected, 1e-4, "gates")
    for width in (384, 768, 1024, 1152):
        for kind in ("dtr", "random"):
            masks = [wb.routing_mask(t.to(d), width, kind=kind).cpu() for d in ("cpu", here.device)]
            if not torch.equal(*masks):
                differ = int((masks[0] != masks[1]).any(1).sum())
                raise AssertionError(f"masks {kind} of width {width} differ at {differ} timesteps: expected none")
    return {"gates differ by": off}


def sampling(here) -> dict:
    "Images of every sampler: plain, patched with gates from a table, and routed."
    found = {}
    for method in ("", "dmp", "dtr"):
        model = model_of(here, method)
        for sampler in ("ddim",) if here.tiny else ("ddim", "ddpm", "dpmsolver++"):
            settings = dict(num_images=4, sampler=sampler, num_inference_steps=4, quiet=True, clamp=False)
            expected = wb.sample(model.cpu(), **settings)
            name = f"{method or 'plain'}, {sampler}"
            found[name] = near(wb.sample(model.to(here.device), **settings), expected, 5e-3, f"images of {name}")
    return {"largest difference": max(found.values())}


def train(here, experiment: str, *overrides: str, steps: int = 4, cpu: bool = False,
          folder: Path | None = None) -> wb.Run:
    "A short training on the device or the CPU, in this process."
    here.forget_accelerator()
    name = f"run-{len(list(here.folder.glob('run-*'))):03d}"
    try:
        expected = "cpu" if cpu else here.kind
        settings = [*QUIET, f"train.steps={steps}", "train.batch_size=16", *overrides]
        settings.append(f"train.cpu={str(cpu or here.kind == 'cpu').lower()}")
        run = wb.train(experiment, settings, folder or here.folder / name)
        here.forget_accelerator(expected)
        return run
    finally: here.forget_accelerator()


def losses_of(run: wb.Run) -> torch.Tensor: return torch.tensor(run.metrics()["loss"])


def methods(here) -> dict:
    "A few steps of training with every method, against the same on the CPU."
    cases = {"dmp": ["digits-dmp"], "dtr": ["digits-dtr"]}
    if not here.tiny:
        cases |= {name: [f"digits-{name}"] for name in ("pretrain", "prompt-tuning", "lmask", "switch", "tlora")}
        cases["uncertainty weighting"] = ["digits-quick", "multitask.method=uw", "multitask.k=2"]
    found, wrong = {}, []
    for name, settings in cases.items():
        try:
            expected = losses_of(train(here, *settings, cpu=True))
            found[name] = near(losses_of(train(here, *settings)), expected, 5e-3, f"losses of {name}")
        except Exception as e: wrong.append(f"{name}: {type(e).__name__}: {e}")
    if wrong: raise AssertionError("; ".join(wrong))
    return {"largest difference": max(found.values())}


def precisions(here) -> dict:
    "Gradient checkpointing, TF32, bfloat16 and float16 against float32, all on the device."
    cases = {"gradient checkpointing": (["train.gradient_checkpointing=true"], 1e-5)}
    if here.kind != "emu": cases["bf16"] = ["train.mixed_precision=bf16"], 5e-2   # the second device has no autocast
    if here.cuda: cases |= {"tf32": (["train.tf32=true"], 1e-2), "fp16": (["train.mixed_precision=fp16"], 2e-2)}
    expected, found, wrong = losses_of(train(here, "digits-dmp", steps=6)), {}, []
    for name, (settings, tolerance) in cases.items():
        try: found[name] = near(losses_of(train(here, "digits-dmp", *settings, steps=6)), expected, tolerance,
                                f"losses with {name}")
        except Exception as e: wrong.append(f"{name}: {type(e).__name__}: {e}")
    if wrong: raise AssertionError("; ".join(wrong))
    return found


def compiled(here) -> dict:
    "Training with train.compile against training without; in bfloat16 on a GPU, as it is used."
    if not here.compile: raise Skip("not asked for: --compile")
    expected = losses_of(train(here, "digits-dmp"))
    return {"differ by": near(losses_of(train(here, "digits-dmp", "train.compile=true")), expected, 1e-3,
                              "losses of a compiled model")}


def killed_here(kind: str, folder: str, at: int):
    "In a process of its own: train, and die as by `kill -9` when the batch of a step is asked for."
    from benchmarks import stepping
    from dmp_wb.data.sources import DATASETS, digits, SourceEntry
    data = stepping.watched(digits())

    def die(n):
        if n == at: os.kill(os.getpid(), signal.SIGKILL)
    data.at_step = die
    DATASETS["digits"] = SourceEntry(lambda config: data)
    device = Device(kind)
    device.folder = Path(folder).parent
    train(device, "digits-dmp", *LONG, steps=12, folder=Path(folder))


LONG = ["train.checkpoint_every=3", "train.keep_last=9"]


def resume(here) -> dict:
    "A training that is killed between two checkpoints and started again, against one that nobody touched: to the bit."
    broken = here.folder / "broken"
    command = [sys.executable, str(Path(__file__).parents[1] / "gpu.py"), "--die", str(broken), "--device", here.kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != -signal.SIGKILL:
        raise AssertionError(f"the training ended with {done.returncode} and not by SIGKILL: {done.stderr[-1500:]}")
    at = load_checkpoint(newest_checkpoint(broken))["step"]
    states = [load_checkpoint(newest_checkpoint(train(here, "digits-dmp", *LONG, steps=12, folder=folder).folder))
              for folder in (broken, here.folder / "whole")]
    if not same(*states):
        again = load_checkpoint(newest_checkpoint(train(here, "digits-dmp", *LONG, steps=12).folder))
        why = "two unbroken trainings differ too, so the kernels do"
        if same(states[1], again): why = "two unbroken trainings are equal, so resuming is at fault"
        raise AssertionError(f"weights after a kill and a resumption at step {at} differ from an unbroken run's; {why}")
    return {"resumed at step": at}


def same(a: dict, b: dict) -> bool:
    pairs = [(v, b["model"][k]) for k, v in a["model"].items()]
    pairs += zip(a["ema"]["shadow_params"], b["ema"]["shadow_params"])
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in pairs)


class NoVAE(nn.Module):
    "In place of a pipeline's VAE: latents are the images."
    config, dtype = SimpleNamespace(scaling_factor=1.0, block_out_channels=[1]), torch.float32

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    @property
    def device(self): return self.nothing.device

    def decode(self, latents): return SimpleNamespace(sample=latents / 1e5)


def offloading(here) -> dict:
    "Group offloading and model offloading of a patched model, as diffusers does them."
    if here.kind == "cpu": raise Skip("needs a device to load onto")
    from diffusers import DiTPipeline
    from dmp_wb.diffusion.schedules import sampler
    x, y, t, _ = (v.to(here.device) for v in batch_of(here))
    model = model_of(here, "dmp").to(here.device)
    with torch.no_grad(): expected = model(x, t, y).sample
    found = {}
    for kind, settings in {"leaf_level": {}, "block_level": {"num_blocks_per_group": 1}}.items():
        off = model_of(here, "dmp")
        off.enable_group_offload(onload_device=here.device, offload_device=torch.device("cpu"), offload_type=kind,
                                 **settings)
        with torch.no_grad(): found[kind] = near(off(x, t, y).sample, expected, 1e-5, f"answers offloaded by {kind}")
    draw = lambda pipe: pipe([1, 2], generator=torch.Generator().manual_seed(0), num_inference_steps=2,
                             output_type="pt").images
    pipe = lambda model: DiTPipeline(model, NoVAE(), sampler("ddim", num_inference_steps=2))
    whole, off = pipe(model.to(here.device)).to(here.device), pipe(model_of(here, "dmp"))
    off.enable_model_cpu_offload(device=here.device)
    for p in (whole, off): p.set_progress_bar_config(disable=True)
    near(draw(off) - 0.5, draw(whole) - 0.5, 1e-4, "images of an offloaded pipeline")
    return found


def evaluation(here) -> dict:
    "Features, their distances and the digits' scores, where the images are."
    images = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(32) % 10
    expected = extractors.evaluate_digits(images, labels)
    found = extractors.evaluate_digits(images.to(here.device), labels.to(here.device))
    off = near(torch.tensor(list(found.values())), torch.tensor(list(expected.values())), 1e-3, "scores of digits")
    network = features.digit_classifier()
    features_here = extractors.extract(network, images)
    near(extractors.extract(network.to(here.device), images), features_here, 1e-4, "features")
    return {"scores differ by": off}


def two_processes(here) -> dict:
    "Two processes on two devices against one: the same losses."
    if not here.cuda or torch.cuda.device_count() < 2: raise Skip("needs two devices")
    expected = losses_of(train(here, "digits-dmp"))
    run = wb.launch("digits-dmp", [*QUIET, "train.steps=4", "train.batch_size=16"], 2, here.folder / "two")
    return {"differ by": near(losses_of(run), expected, 1e-4, "losses of two processes")}


def exact(check):
    "With float32 as float32, and without the warnings of a check."
    def run(here):
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: return check(here)
            finally:
                torch.set_float32_matmul_precision(before[0])
                torch.backends.cudnn.allow_tf32 = before[1]
    return run


# name: what, and the seconds that have to be left for it on a GPU; the most important first
CHECKS = {"losses": (losses, 15), "gates and masks": (gates_and_masks, 8), "sampling": (sampling, 12),
          "training of every method": (methods, 25), "precisions": (precisions, 15),
          "resume after a kill": (resume, 30), "two processes": (two_processes, 30), "offloading": (offloading, 10),
          "evaluation": (evaluation, 5), "compile": (compiled, 45)}
