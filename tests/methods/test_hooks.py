"What users do to patched and routed models between and during forward passes."
import copy
import warnings
import weakref

import pytest
import torch
from backbones import BACKBONES, INPUT_SIZE, inputs_for, output
from conftest import randomise, tiny_dit
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import dmp_wb as wb
from dmp_wb.models.backbones import registered
from dmp_wb.core.errors import BadInput
from dmp_wb.methods.hooks import HOOKS_NAME
from dmp_wb.methods.patches import PATCH_NAME


@torch.no_grad()
def run(model, inputs): return model(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample


def grads_of(model, loss):
    model.zero_grad()
    loss.backward()
    return [w.grad.clone() for w in model.parameters() if w.grad is not None]


def test_checkpointed_blocks_run_again_as_they_ran_first(inputs):
    "Patches switched or turned off, or a route gone, between forward and backward pass."
    x, t, y = inputs
    grads = []
    for on in (False, True):
        model = tiny_dit().train()
        model.enable_gradient_checkpointing() if on else model.disable_gradient_checkpointing()
        for name, seed in (("a", 1), ("b", 2)): randomise(wb.patch(model, name=name), 0.5, seed)
        wb.use_patches(model, "a")
        first = model(x, t, y).sample.square().mean()
        wb.use_patches(model, "b")
        second = model(x, t.flip(0), y).sample.square().mean()
        with wb.patch_disabled(model): third = model(x.clone().requires_grad_(), t, y).sample.square().mean() * 0
        with wb.patch_disabled(model): grads.append(grads_of(model, first + second + third))
    assert len(grads[0]) == len(grads[1]) == 6 and all(torch.allclose(a, b, atol=1e-6)
                                                       for a, b in zip(*grads, strict=True))


def test_a_checkpoint_around_the_whole_model(inputs):
    x, t, y = inputs
    model = tiny_dit().train()
    randomise(wb.patch(model), 0.5)
    wb.route(model)
    plain = grads_of(model, model(x, t, y).sample.square().mean())
    losses = [checkpoint(lambda a: model(a, t, y).sample.square().mean(), x, use_reentrant=False),
              model(x, t.flip(0), y).sample.mean() * 0]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, grads_of(model, sum(losses)), strict=True))


def test_reentrant_checkpoints_are_refused(inputs):
    model = tiny_dit().train()
    wb.route(model)
    model._gradient_checkpointing_func = lambda block, *args: checkpoint(block, *args, use_reentrant=True)
    model.gradient_checkpointing = True
    loss = model(inputs[0].requires_grad_(), *inputs[1:]).sample.sum()
    with pytest.raises(BadInput, match="expected use_reentrant=False"): loss.backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_models_notice_what_comes_and_goes(inputs):
    model = tiny_dit().requires_grad_(False)
    compiled, plain = torch.compile(model, backend="eager"), run(model, inputs)
    assert torch.allclose(run(compiled, inputs), plain, atol=1e-5)
    wb.route(model)
    routed = run(model, inputs)
    assert not torch.allclose(routed, plain, atol=1e-3) and torch.allclose(run(compiled, inputs), routed, atol=1e-5)
    randomise(wb.patch(model), 0.5)
    both = run(model, inputs)
    assert not torch.allclose(both, routed, atol=1e-3) and torch.allclose(run(compiled, inputs), both, atol=1e-5)
    with wb.patch_disabled(model): assert torch.allclose(run(compiled, inputs), routed, atol=1e-5)
    wb.unroute(wb.unpatch(model))
    assert torch.allclose(run(compiled, inputs), plain, atol=1e-5)


def test_a_model_that_calls_itself(inputs):
    "Self-conditioning: the outer pass goes on with its own gates and masks."
    x, t, y = inputs
    model = tiny_dit()
    randomise(wb.patch(model), 0.5)
    wb.route(model)
    want, inner = run(model, inputs), []
    handle = model.blocks[1].register_forward_hook(lambda *a: None if inner
                                                   else (inner.append(1), run(model, (x, t.flip(0), y)))[:0] or None)
    assert torch.equal(run(model, inputs), want) and inner
    handle.remove()


def test_after_an_error_the_next_call_is_right(inputs):
    model = tiny_dit()
    randomise(wb.patch(model), 0.5)
    want = run(model, inputs)
    handle = model.blocks[2].register_forward_hook(lambda *a: (_ for _ in ()).throw(RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom"): run(model, (inputs[0], inputs[1].flip(0), inputs[2]))
    handle.remove()
    assert torch.equal(run(model, inputs), want)


def test_a_block_alone():
    model = tiny_dit()
    wb.patch(model)
    for _ in range(2):   # before a call of the model, and after one
        with pytest.raises(BadInput, match="was called alone"):
            model.blocks[0](torch.zeros(1, 16, 32), torch.zeros(1, 32))
        model(torch.zeros(1, 1, 8, 8), 5)


def test_one_module_as_several_blocks():
    model = tiny_dit()
    model.blocks[2] = model.blocks[0]
    for change in (wb.patch, wb.route):
        with pytest.raises(BadInput, match="a module is several blocks"): change(model)
    assert not hasattr(model, HOOKS_NAME) and PATCH_NAME not in model._modules and all(
        w.requires_grad for w in model.parameters())


def test_a_stranger_of_the_same_name():
    class DiT(nn.Module): pass
    for change in (wb.patch, wb.route):
        with pytest.raises(BadInput, match="DiT is not a known backbone.*register_backbone"): change(DiT())
    wb.register_backbone(DiT, wb.Anatomy(blocks=lambda m: [], grid_size=lambda m: (1, 1), width=lambda m: 8,
                                         embed_timestep=lambda m, t: t, embedding_width=lambda m: 8))
    assert wb.patch(tiny_dit()).prompts.shape[2] == 32 and "DiT" in registered()


def test_subclasses_with_open_signatures(inputs):
    class Mine(type(tiny_dit())):
        def forward(self, *args, **kwargs): return super().forward(*args, **kwargs)
    model = Mine(sample_size=8, in_channels=1, hidden_size=32, num_layers=3, num_attention_heads=4,
                 num_classes=10).eval()
    randomise(model)
    p = randomise(wb.patch(model), 0.5)
    with torch.no_grad(): model(inputs[0], inputs[1], inputs[2])
    assert torch.allclose(p.last_gates, p.gates(inputs[1]), atol=1e-6)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_layerwise_casting(name, when):
    "Weights stored in eight bits and computed with in 32: the gates are those of the same weights without it."
    if not hasattr(BACKBONES[name](), "enable_layerwise_casting"): pytest.skip("has none")
    model, kwargs = BACKBONES[name](), inputs_for(name)
    cast = lambda: model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    if when == "before": cast()
    p = randomise(wb.patch(model, wb.DMPConfig(input_size=INPUT_SIZE.get(name))), 0.3)
    if when == "after": cast()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = output(model, kwargs)
    assert out.isfinite().all() and p.gate.weight.dtype == torch.float32
    low = BACKBONES[name]()
    q = randomise(wb.patch(low, wb.DMPConfig(input_size=INPUT_SIZE.get(name))), 0.3)
    output(low, kwargs)
    assert (p.last_gates - q.last_gates).abs().max() < 0.2 and (p.last_gates[0] - p.last_gates[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["handles", "was_trainable", "training", "_modules", "keys", "x.y", "", 5, None])
def test_names_that_cannot_be(name):
    model = tiny_dit()
    with pytest.raises(BadInput, match="name is"): wb.patch(model, name=name)
    assert (PATCH_NAME not in model._modules and all(w.requires_grad for w in model.parameters())
            and not model._state_dict_hooks and not hasattr(model, HOOKS_NAME))


@pytest.mark.parametrize("config,match", [
    (dict(input_size=5), "input_size is 5: expected"), (dict(importance_weight=None), "importance_weight is None"),
    (dict(importance_weight="x"), "importance_weight is 'x'"),
    (dict(noisy_gating="yes"), "noisy_gating is 'yes': expected true or false"), (dict(top_k=True), "top_k is True"),
    (dict(input_size=[3, 8, 8]), "does not fit a DiT: expected 2 sides"),
    (dict(input_size=[7, 7]), r"does not fit a DiT: expected multiples of \(2, 2\)"),
])
def test_configs_that_cannot_be(config, match):
    model = tiny_dit()
    with pytest.raises(BadInput, match=match): wb.patch(model, wb.DMPConfig(**config))
    assert all(w.requires_grad for w in model.parameters()) and not hasattr(model, HOOKS_NAME)


def test_routes_that_cannot_be():
    model = tiny_dit()
    with pytest.raises(BadInput, match="leaves a channel of 32"): wb.route(model, wb.DTRConfig(sharing_ratio=0.01))
    with pytest.raises(BadInput, match="seed is 1.5"): wb.route(model, wb.DTRConfig(kind="random", seed=1.5))
    assert wb.get_router(model) is None and not hasattr(model, HOOKS_NAME)
    assert not torch.equal(wb.routing_mask([3], 64, kind="random", seed=0),
                           wb.routing_mask([3], 64, kind="random", seed=4096))


def test_the_callers_settings_stay_the_callers():
    model, dmp, dtr = tiny_dit(), wb.DMPConfig(), wb.DTRConfig()
    p, r = wb.patch(model, dmp), wb.route(model, dtr)
    dmp.top_k, dtr.sharing_ratio = 3, 5.0
    assert p.config.top_k is None and r.config.sharing_ratio == 0.8


def test_a_pipeline_or_a_wrapper_instead_of_its_model():
    class Pipeline:
        def __init__(self): self.transformer = tiny_dit()
    with pytest.raises(BadInput, match="Pipeline is not a known backbone.*did you mean its .transformer"):
        wb.patch(Pipeline())
    with pytest.raises(BadInput, match="did you mean its .net.inner"):
        wb.route(nn.ModuleDict({"net": nn.ModuleDict({"inner": nn.DataParallel(tiny_dit())})}))
    model = tiny_dit()
    model.dmp = nn.Linear(2, 2)
    with pytest.raises(BadInput, match="has a part of its own named 'dmp'"): wb.patch(model)


@pytest.mark.parametrize("change,match", [
    (lambda w: {"nonsense": torch.zeros(1)}, "holds .*nonsense.*expected"), (lambda w: {}, "holds {}: expected"),
    (lambda w: {**w, "prompts": w["prompts"] * float("nan")}, "'prompts' holds NaN"),
    (lambda w: {**w, "prompts": w["prompts"][:1]}, "expected"),
    (lambda w: {**w, "prompts": w["prompts"].long()}, "int64: expected floating point"),
])
def test_nothing_is_saved_that_could_not_be_loaded(change, match, tmp_path):
    model = tiny_dit()
    p = randomise(wb.patch(model), 0.5)
    wb.save_patch(model, tmp_path / "p")
    good = load_file(tmp_path / "p" / "adapter_model.safetensors")
    with pytest.raises(BadInput, match=match): wb.save_patch(model, tmp_path / "p", state_dict=change(p.state_dict()))
    kept = load_file(tmp_path / "p" / "adapter_model.safetensors")
    assert all(torch.equal(v, kept[k]) for k, v in good.items())


@pytest.mark.parametrize("tensor,match", [(torch.full((3, 16, 32), 1e300, dtype=torch.float64), "beyond torch.float32"),
                                          (torch.zeros(3, 16, 32, dtype=torch.int32), "expected floating point")])
def test_files_of_other_precisions(tensor, match, tmp_path, inputs):
    model = tiny_dit()
    wb.patch(model)
    wb.save_patch(model, tmp_path / "p")
    file = tmp_path / "p" / "adapter_model.safetensors"
    save_file({**load_file(file), "prompts": tensor}, file)
    with pytest.raises(BadInput, match=match): wb.load_patch(tiny_dit(), tmp_path / "p")
    save_file({**{k: v.to(torch.float8_e4m3fn) for k, v in load_file(file).items() if k != "prompts"},
               "prompts": torch.ones(3, 16, 32).to(torch.float8_e4m3fn)}, file)
    assert (wb.load_patch(tiny_dit(), tmp_path / "p").prompts == 1).all()


def test_low_precision_timesteps_and_baked_tables():
    "Flux's pipeline divides a bf16 timestep by 1000; the table is asked with what comes of it."
    model = BACKBONES["FluxTransformer2DModel"]().bfloat16()
    p = randomise(wb.patch(model, wb.DMPConfig(input_size=INPUT_SIZE["FluxTransformer2DModel"])), 0.3).bfloat16()
    steps = torch.tensor([1000.0, 863.28, 613.1, 8.93])
    for t in steps:
        kwargs = {k: v.bfloat16() if v.is_floating_point() else v
                  for k, v in inputs_for("FluxTransformer2DModel").items()}
        kwargs["timestep"] = t.expand(2).to(torch.bfloat16) / 1000
        want = output(model, kwargs)
        with p.baked(steps): assert torch.equal(output(model, kwargs), want)
    with pytest.raises(BadInput, match="timesteps are empty"), p.baked([]): pass
    with pytest.raises(BadInput, match="timestep 5000 is out of range"), p.baked([5000]): pass
    with p.baked(steps):
        assert copy.deepcopy(p).tables.value is None
        with p.baked(steps[:1]): pass
        assert len(p.tables.value.values) == 4


def test_a_models_own_memory_is_free_again(inputs):
    "No forward pass keeps more than its gates: not the tokens that passed by."
    model = tiny_dit()
    wb.patch(model)
    wb.route(model)
    run(model, inputs)
    assert getattr(model, HOOKS_NAME).call is None and wb.get_patch(model).newest.left[0][16].numel() == 4 * 3 * 16
    passed = []
    handle = model.blocks[1].register_forward_pre_hook(lambda m, args: passed.append(weakref.ref(args[0])))
    run(model, inputs)
    handle.remove()
    assert len(passed) == 1 and passed[0]() is None
