"A patched and routed backbone inside the pipelines people use: whole tiny pipelines, made, saved and loaded here."
import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload_with_hook
from conftest import randomise
from diffusers import DiffusionPipeline
from pipelines import PIPELINES, backbone_of, generate

import dmp_wb as wb

pytestmark = pytest.mark.parametrize("name", PIPELINES)
SIZE = {"FluxPipeline": (8, 12)}   # latents; Flux's config fixes none


@pytest.fixture
def pipe(name, tmp_path): return PIPELINES[name](tmp_path / "scratch")


def change(pipe, name, **settings):
    "A patch away from zero, and a route."
    randomise(wb.patch(backbone_of(pipe), wb.DMPConfig(input_size=SIZE.get(name), **settings)), 0.5)
    wb.route(backbone_of(pipe))


def differ(a, b): return (a - b).abs().max() > 1e-3


def test_images_before_and_after_files(name, pipe, tmp_path):
    model = backbone_of(pipe)
    plain = generate(name, pipe)
    change(pipe, name)
    both = generate(name, pipe)
    wb.unroute(model)
    patched = generate(name, pipe)
    assert both.isfinite().all() and differ(both, plain) and differ(patched, plain) and differ(both, patched)
    wb.save_patch(model, tmp_path / "patch")
    pipe.save_pretrained(tmp_path / "pipe")                       # as if nothing were there
    again = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert torch.allclose(generate(name, again), plain, atol=1e-5)
    wb.load_patch(backbone_of(again), tmp_path / "patch")
    assert torch.allclose(generate(name, again), patched, atol=1e-5)
    wb.route(backbone_of(again))
    assert torch.allclose(generate(name, again), both, atol=1e-5)
    wb.unpatch(wb.unroute(backbone_of(again)))
    assert torch.allclose(generate(name, again), plain, atol=1e-5)


def test_one_gate_a_step_and_a_table(name, pipe):
    change(pipe, name)
    model = backbone_of(pipe)
    p, rows, times = wb.get_patch(model), [], []

    def note(m, args, kwargs, out):
        rows.append(len(p.last_gates))
        times.append(kwargs.get("timestep", args[1] if len(args) > 1 else None))
    watch = model.register_forward_hook(note, with_kwargs=True)
    want = generate(name, pipe, steps=3)
    watch.remove()
    assert set(rows) == {1} and len(rows) >= 3                     # guidance batches share their timestep
    scale = {"FluxPipeline": 1000}.get(name, 1)
    table = sorted({float(torch.as_tensor(t).flatten()[0].double() * scale) for t in times})
    with p.baked(table): assert torch.equal(generate(name, pipe, steps=3), want)


def test_bfloat16(name, pipe):
    wide = generate(name, pipe)
    change(pipe, name)
    with torch.no_grad():   # enough to stand out from what bf16 itself changes
        for w in wb.get_patch(backbone_of(pipe)).prompts: w.mul_(8)
    changed = generate(name, pipe)
    pipe.to(torch.bfloat16)
    assert wb.get_patch(backbone_of(pipe)).gate.weight.dtype == torch.bfloat16
    narrow = generate(name, pipe)
    assert narrow.isfinite().all() and (narrow - changed).abs().mean() < 0.5 * (wide - changed).abs().mean()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(name, pipe, how):
    change(pipe, name)
    want = generate(name, pipe)
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, part, how(backbone_of(pipe)))
    assert torch.equal(generate(name, pipe), want)


def test_offload(name, pipe):
    """`enable_model_cpu_offload` itself asks for an accelerator;
    here its hook is put on every component, and moves them between devices of one kind."""
    change(pipe, name)
    want = generate(name, pipe)
    hook = None
    for part in (pipe.components[k]
                 for k in pipe.model_cpu_offload_seq.split("->") if pipe.components.get(k) is not None):
        _, hook = cpu_offload_with_hook(part, execution_device="cpu", prev_module_hook=hook)
    assert torch.equal(generate(name, pipe), want)
    if not torch.accelerator.is_available():
        with pytest.raises((RuntimeError, ValueError)): pipe.enable_model_cpu_offload()
        return
    pipe.enable_model_cpu_offload()
    assert torch.allclose(generate(name, pipe), want, atol=1e-2)


def test_gradient_checkpointing_in_training(name, pipe):
    model = backbone_of(pipe)
    change(pipe, name)
    model.enable_gradient_checkpointing()
    model.train()
    seen = {}
    watch = model.register_forward_pre_hook(lambda m, a, kw: seen.update(args=a, kwargs=kw), with_kwargs=True)
    torch.manual_seed(0)
    generate(name, pipe)
    watch.remove()
    # inference tensors cannot take part in autograd
    clone = (lambda v: {k: clone(w) for k, w in v.items()} if isinstance(v, dict)
             else v.clone() if isinstance(v, torch.Tensor) else v)
    grads = []
    for on in (True, False):
        model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()
        model.zero_grad()
        torch.manual_seed(0)
        out = model(*map(clone, seen["args"]), **clone(seen["kwargs"]))
        (out[0] if isinstance(out, tuple) else out.sample).square().mean().backward()
        grads.append([w.grad.clone() for w in wb.get_patch(model).parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) and a.abs().sum() > 0 for a, b in zip(*grads, strict=True))
