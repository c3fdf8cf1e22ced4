"What the methods beside DMP and DTR have in common: all of the protocol, on many backbones."
import copy

import pytest
import torch
from backbones import BACKBONES, inputs_for, output
from conftest import randomise, tiny_dit
from torch.utils.checkpoint import checkpoint

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.methods.base import apply_methods, methods_of, restore_methods, save_methods
from dmp_wb.methods.registry import method_class, method_entry
from dmp_wb.training import loop

METHODS = {"lmask": dict(sharing_ratio=0.6, knots=4), "switch": dict(num_experts=3, top_k=2),
           "tlora": dict(rank=2, scales=[1, 2])}
TRANSFORMERS = [name for name in BACKBONES if not name.startswith("UNet")]


def on(model, name, std=0.2):
    "A model's new method, whose parameters are not zero."
    method = apply_methods(model, {name: method_entry(name).made(**METHODS[name])})[name]
    return randomise(method, std) if std else method


@torch.no_grad()
def run(model, inputs): return model(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample


@pytest.mark.parametrize("name,backbone", [("switch", b) for b in TRANSFORMERS] + [("lmask", b) for b in BACKBONES])
def test_it_acts_sample_by_sample_and_comes_off_every_backbone(name, backbone):
    model, kwargs = BACKBONES[backbone](), inputs_for(backbone)
    plain, frozen = output(model, kwargs), {n for n, p in model.named_parameters() if not p.requires_grad}
    method = on(model, name, std=None).eval()
    if name == "switch": assert torch.allclose(output(model, kwargs), plain, atol=1e-6)   # one is m at the start
    randomise(method, 0.3)
    acting = output(model, kwargs)
    assert acting.isfinite().all() and not torch.allclose(acting, plain, atol=1e-4)
    shared = inputs_for(backbone, timestep=500)
    rows = {**shared, "timestep": shared["timestep"][:1].expand(2)}
    assert torch.allclose(output(model, shared), output(model, rows), atol=1e-4, rtol=1e-3)
    method.remove()
    assert torch.equal(output(model, kwargs), plain) and not methods_of(model)
    assert frozen == {n for n, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("name", METHODS)
def test_files_hold_all_of_it(name, tmp_path, inputs):
    model = tiny_dit()
    method = on(model, name).eval()
    acting, facts = run(model, inputs), method.facts()
    save_methods(model, tmp_path)
    other = tiny_dit()
    restore_methods(other, {name: method.config}, tmp_path)
    loaded = methods_of(other)[name]
    assert torch.equal(run(other, inputs), acting) and loaded.facts() == facts and loaded.config == method.config
    assert not loaded.training
    model.save_pretrained(tmp_path / "model")
    plain = wb.DiT.from_pretrained(tmp_path / "model")   # the plain model's weights alone
    assert plain.state_dict().keys() == tiny_dit().state_dict().keys()
    broken = tmp_path / "methods" / name / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-8])
    third = tiny_dit()
    with pytest.raises(BadInput, match="safetensors"): restore_methods(third, {name: method.config}, tmp_path)
    assert not methods_of(third) and all(p.requires_grad for p in third.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_acts_and_comes_off_by_itself(name, inputs):
    model = tiny_dit()
    on(model, name)
    model.train()
    model(inputs[0], timestep=inputs[1], class_labels=inputs[2])   # leaves a loss behind, which cannot be copied
    twin = copy.deepcopy(model.eval())
    acting = run(model, inputs)
    assert torch.equal(run(twin, inputs), acting)
    randomise(methods_of(twin)[name], 3.0, seed=1)   # far: masks are rounded to whole channels
    assert torch.equal(run(model, inputs), acting) and not torch.equal(run(twin, inputs), acting)
    methods_of(twin)[name].remove()
    assert torch.equal(run(twin, inputs), run(tiny_dit(), inputs)) and torch.equal(run(model, inputs), acting)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_it_compiles_without_a_break(name, inputs, training):
    model = tiny_dit()
    on(model, name)
    model.train(training)
    plain = model(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample, plain, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_through_checkpointed_blocks_are_the_same(name, inputs):
    def gradients(checkpointed):
        model = tiny_dit()
        method = on(model, name)
        model.train()
        if checkpointed: model.enable_gradient_checkpointing()
        model(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample.square().mean().backward()
        return {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    plain, checkpointed = gradients(False), gradients(True)
    assert plain and plain.keys() == checkpointed.keys()
    assert all(torch.allclose(g, checkpointed[n], atol=1e-6) for n, g in plain.items())


@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_around_the_whole_model_gives_the_same_gradients(name, inputs):
    def gradients(around):
        model = tiny_dit()
        method = on(model, name)
        model.train()
        call = lambda x: model(x, timestep=inputs[1], class_labels=inputs[2]).sample
        x = inputs[0].clone().requires_grad_()
        (checkpoint(call, x, use_reentrant=False) if around else call(x)).square().mean().backward()
        return {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    plain, around = gradients(False), gradients(True)
    assert all(torch.allclose(g, around[n], atol=1e-6) for n, g in plain.items())


@pytest.mark.parametrize("name", METHODS)
def test_bf16_and_autocast(name, inputs):
    model = tiny_dit()
    on(model, name, 0.1)
    model.train()
    exact = run(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(run(model, inputs).float(), exact, atol=0.1)
        model(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample.float().square().mean().backward()
    half = tiny_dit().to(torch.bfloat16)
    on(half, name, 0.1)
    assert run(half, (inputs[0].bfloat16(), *inputs[1:])).isfinite().all()


@pytest.mark.parametrize("pair", [("lmask", "switch"), ("switch", "dtr"), ("lmask", "dtr"), ("tlora", "dmp")])
def test_methods_that_cannot_share_a_model(pair):
    model = tiny_dit()
    with pytest.raises(BadInput, match="cannot be on the same model"):
        apply_methods(model, {name: method_entry(name).made() for name in pair})
    assert not methods_of(model) and all(p.requires_grad for p in model.parameters())


def test_a_lora_on_a_model_whose_mask_learns(inputs):
    model = tiny_dit()
    methods = apply_methods(model, {"lmask": method_entry("lmask").made(), "tlora": method_entry("tlora").made()})
    model.train()
    model(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample.square().mean().backward()
    learn = {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad}
    assert learn == {"lmask", "tlora"} and methods["lmask"].mask.rises.grad is not None


@pytest.mark.parametrize("name", METHODS)
def test_panels_and_class_agree_with_the_registry(name):
    model = tiny_dit()
    method, entry = on(model, name), method_entry(name)
    cls = method_class(name)
    assert (cls.Config, cls.freezes, cls.excludes) == (entry.config, entry.freezes, entry.excludes)
    panels = method.panels(torch.arange(0, 1000, 100))
    assert panels and all(len(p.values) == 10 for p in panels)
    for panel in panels:
        if panel.kind == "gates": assert torch.allclose(panel.values.sum(-1), torch.ones(10, len(panel.blocks)))


class Killed(Exception): pass


def experiment(name):
    base = "digits-finetune" if name == "tlora" else "digits-quick"
    return wb.load_experiment(base, [
        "model.hidden_size=16", "model.num_layers=2", "model.num_attention_heads=2", "train.batch_size=16",
        "train.steps=6", "train.log_every=1", "train.checkpoint_every=2",
        *(f"methods.{name}.{k}={v}" for k, v in METHODS[name].items())])


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_killed_resumed_to_the_bit_loaded_and_sampled(name, tmp_path, monkeypatch):
    whole = wb.train(experiment(name), folder=tmp_path / "whole")
    original = loop.append_row

    def die(run, row):
        original(run, row)
        if row["step"] == 3: raise Killed
    monkeypatch.setattr(loop, "append_row", die)
    with pytest.raises(Killed): wb.train(experiment(name), folder=tmp_path / "broken")
    monkeypatch.setattr(loop, "append_row", original)
    broken = wb.train(experiment(name), folder=tmp_path / "broken")
    a, b = wb.load_model(whole.folder), wb.load_model(broken.folder)
    state = a.state_dict()
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in state.items())
    assert any(k.startswith(f"dmp_wb_methods.{name}.") for k in state)
    columns = {"lmask": {"mask_drift"}, "switch": {"prior", "expert_use", "expert_entropy"}, "tlora": set()}[name]
    assert columns <= whole.metrics().keys() and whole.experiment.methods.keys() == {name}
    assert (whole.folder / "methods" / name / "model.safetensors").is_file()
    assert (whole.folder / "model").is_dir() == (name != "tlora")
    images = wb.sample(a, 2, class_labels=[1, 2], num_inference_steps=2, seed=0, quiet=True)
    assert images.isfinite().all()
    method = methods_of(a)[name]
    method.remove()
    assert not torch.equal(wb.sample(a, 2, class_labels=[1, 2], num_inference_steps=2, seed=0, quiet=True), images)
