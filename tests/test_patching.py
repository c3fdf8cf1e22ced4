import copy
import json
import pickle

import pytest
import torch
from conftest import randomise, tiny_dit, tiny_diffusers_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import dmp_wb as wb
from dmp_wb.core import BadInput, MissingFile
from dmp_wb.dit import DiT
from dmp_wb.patching import PATCH_NAME


@torch.no_grad()
def run(model, inputs): return model(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample


def trained(model, seed=2, config=None):
    "A patch whose parameters are away from zero."
    return randomise(wb.patch(model, config), 0.5, seed)


def test_fresh_patch_changes_no_bit(backbone, inputs):
    before = run(backbone, inputs)
    wb.patch(backbone)
    assert torch.equal(run(backbone, inputs), before)


def test_output_is_the_papers_formula(inputs):
    model = tiny_dit()
    p = trained(model)
    x, t, y = inputs
    got = run(model, inputs)
    wb.unpatch(model)
    with torch.no_grad():   # every block by hand, the gate from its own [e_t; i]
        e_t = model.t_embedder(t)
        z, c = model.x_embedder(x) + model.pos_embed, model.condition(t, y, 4)
        for i, block in enumerate(model.blocks):
            u = torch.cat([e_t, torch.full((4, 1), float(i))], dim=1)
            g = (u @ p.gate.weight.T + p.gate.bias).softmax(-1)
            assert torch.allclose(g, p.gates(t)[:, i], atol=1e-6)
            z = block(z + g[:, :, None] * p.prompts[i], c)
        want = model.unpatchify(model.final_layer(z, c))
    assert torch.allclose(got, want, atol=1e-5)


def test_gates_are_distributions_over_prompts(backbone):
    p = trained(backbone)
    with torch.no_grad(): g = p.gates(torch.arange(1000))
    assert g.shape == (1000, 3, 16) and torch.allclose(g.sum(-1), torch.ones(1000, 3), atol=1e-5)
    assert (g[0] - g[999]).abs().max() > 1e-3 and (g[:, 0] - g[:, 1]).abs().max() > 1e-3
    with torch.no_grad(): assert torch.allclose(p.gates([3, 500]), g[[3, 500]]) and torch.allclose(p.gates(7), g[7:8])


@given(st.floats(0, 999, allow_nan=False), st.floats(0, 999, allow_nan=False))
@settings(max_examples=20, deadline=None)
def test_gates_at_any_pair_of_times_are_those_of_one(a, b):
    model = tiny_dit()
    p = trained(model)
    with torch.no_grad(): assert torch.allclose(p.gates([a, b]), torch.cat([p.gates(a), p.gates(b)]), atol=1e-6)


def test_size_of_a_dit_l2_patch():
    with torch.device("meta"): model = DiT.from_name("DiT-L/2")
    p = wb.patch(model)
    assert sum(v.numel() for v in p.state_dict().values()) == 6_554_112


@pytest.mark.parametrize("make", [tiny_dit, tiny_diffusers_dit])
def test_only_the_patch_trains(make, inputs):
    model = make().train()
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    p = trained(model)
    names = {n for n, w in model.named_parameters() if w.requires_grad}
    assert names == {f"{PATCH_NAME}.default.{n}" for n, _ in p.named_parameters()}
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=0.1)
    before = {n: w.clone() for n, w in p.named_parameters()}
    for _ in range(2):
        model(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample.square().sum().backward()
        optimizer.step()
    assert all(w.grad is None for n, w in model.named_parameters() if n in frozen)
    assert all(torch.equal(w, frozen[n]) for n, w in model.named_parameters() if n in frozen)
    assert all(not torch.equal(w, before[n]) for n, w in p.named_parameters())
    assert sum(len(s) for s in optimizer.state.values()) == 3 * len(before)   # step and two moments for each patch tensor, for nothing else


def hooks(model): return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._state_dict_hooks) + len(m._load_state_dict_post_hooks) for m in model.modules())


def test_unpatch_restores_exactly(backbone, inputs):
    first = next(iter(dict(backbone.named_parameters())))
    backbone.get_parameter(first).requires_grad_(False)             # what was frozen before stays so
    before, names, count = run(backbone, inputs), set(dict(backbone.named_modules())), hooks(backbone)
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    trained(backbone)
    assert not torch.equal(run(backbone, inputs), before)
    assert wb.unpatch(backbone) is backbone
    assert torch.equal(run(backbone, inputs), before)
    assert set(dict(backbone.named_modules())) == names and hooks(backbone) == count
    assert all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items()) and list(state) == list(backbone.state_dict())
    assert [n for n, w in backbone.named_parameters() if not w.requires_grad] == [first]


def test_model_saves_as_if_unpatched(backbone, inputs, tmp_path):
    names, before = set(backbone.state_dict()), run(backbone, inputs)
    trained(backbone)
    assert set(backbone.state_dict()) == names
    backbone.load_state_dict(backbone.state_dict())                 # strict
    backbone.save_pretrained(tmp_path)
    assert torch.equal(run(type(backbone).from_pretrained(tmp_path), inputs), before)


def test_a_patched_model_inside_another_module_loads_strictly(inputs):
    outer = torch.nn.ModuleDict({"net": tiny_dit()})
    trained(outer["net"])
    assert not any(PATCH_NAME in k for k in outer.state_dict())
    outer.load_state_dict(outer.state_dict())


def test_round_trip_through_files(backbone, inputs, tmp_path):
    p = trained(backbone)
    want, weights = run(backbone, inputs), {k: v.clone() for k, v in p.state_dict().items()}
    folder = wb.save_patch(backbone, tmp_path / "a" / "my-patch")
    assert {f.name for f in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    wb.unpatch(backbone)
    q = wb.load_patch(backbone, folder)
    assert torch.equal(run(backbone, inputs), want)
    assert all(torch.equal(v, weights[k]) for k, v in q.state_dict().items())
    wb.save_patch(backbone, folder)                                 # over an older one
    assert [f.name for f in folder.parent.iterdir()] == ["my-patch"]


def test_prompt_tuning_is_the_patch_without_a_gate(inputs, tmp_path):
    model = tiny_dit()
    p = trained(model, config=wb.DMPConfig(gate_input="none"))
    assert p.gate is None and set(p.state_dict()) == {"prompts"} and (p.gates([3]) == 1).all() and p.balance_loss() == 0
    got = run(model, inputs)
    wb.save_patch(model, tmp_path / "pt")
    wb.unpatch(model)
    with torch.no_grad():
        z, c = model.x_embedder(inputs[0]) + model.pos_embed, model.condition(inputs[1], inputs[2], 4)
        for i, block in enumerate(model.blocks): z = block(z + p.prompts[i], c)
        assert torch.allclose(got, model.unpatchify(model.final_layer(z, c)), atol=1e-5)
    wb.load_patch(model, tmp_path / "pt")
    assert torch.equal(run(model, inputs), got)


def test_balance_loss_is_the_papers(inputs):
    model = tiny_dit()
    p = wb.patch(model)
    run(model, inputs)
    assert p.balance_loss() == 0                                   # uniform gates are balanced
    randomise(p, 0.5)
    run(model, inputs)
    g = p.gates(inputs[1]).double()
    importance = [[sum(g[b, i, j].item() for i in range(3)) for j in range(16)] for b in range(4)]
    flat = [v for row in importance for v in row]
    mean = sum(flat) / len(flat)
    variance = sum((v - mean) ** 2 for v in flat) / (len(flat) - 1)
    assert abs(p.balance_loss().item() - variance / (mean**2 + 1e-10)) < 1e-6


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(backbone, inputs, how):
    trained(backbone)
    backbone(inputs[0], timestep=inputs[1], class_labels=inputs[2])     # leaves gates with a graph behind
    want = run(backbone, inputs)
    twin = how(backbone)
    assert torch.equal(run(twin, inputs), want)
    with torch.no_grad(): wb.get_patch(twin).prompts.zero_()
    assert torch.equal(run(backbone, inputs), want) and not torch.equal(run(twin, inputs), want)
    wb.unpatch(twin)
    assert torch.equal(run(backbone, inputs), want) and hooks(twin) < hooks(backbone)


def test_scalar_timestep_and_guidance_batch(backbone, inputs):
    p = trained(backbone)
    x, _, y = inputs
    with torch.no_grad():
        one = backbone(x, timestep=torch.full((4,), 321), class_labels=y).sample
        if isinstance(backbone, DiT):
            assert torch.allclose(backbone(x, timestep=321, class_labels=y).sample, one, atol=1e-6)
            assert p.last_gates.shape[0] == 1                           # one gate for a batch that shares its timestep
            assert torch.allclose(backbone(x, torch.tensor(321), y).sample, one, atol=1e-6)
        assert torch.allclose(backbone(x, timestep=torch.tensor(321).expand(4), class_labels=y).sample, one, atol=1e-6)   # as pipelines do
        assert p.last_gates.shape[0] == 1
        both = backbone(torch.cat([x, x]), timestep=torch.full((8,), 321), class_labels=torch.cat([y, torch.full((4,), 10)])).sample
    assert torch.allclose(both[:4], one, atol=1e-5)


def test_gradient_checkpointing(backbone, inputs):
    p = trained(backbone.train())
    grads = []
    for on in (False, True):
        backbone.enable_gradient_checkpointing() if on else backbone.disable_gradient_checkpointing()
        p.zero_grad()
        torch.manual_seed(0)   # diffusers' DiT drops labels in training
        backbone(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample.square().sum().backward()
        grads.append([w.grad.clone() for w in p.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) and a.abs().sum() > 0 for a, b in zip(*grads, strict=True))


def test_bfloat16(inputs, tmp_path):
    model = tiny_dit().to(torch.bfloat16)
    trained(model)
    out = run(model, (inputs[0].bfloat16(), *inputs[1:]))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert wb.get_patch(model).prompts.dtype == torch.bfloat16 and model.dtype == torch.bfloat16


@pytest.mark.slow
def test_compiles_without_a_graph_break(inputs):
    model = tiny_dit()
    trained(model)
    want = run(model, inputs)
    with torch.no_grad(): assert torch.allclose(torch.compile(model, fullgraph=True)(*inputs).sample, want, atol=1e-5)


# --- bad input: a clear line, and the model as it was

def test_patched_twice(backbone, inputs):
    trained(backbone)
    want = run(backbone, inputs)
    with pytest.raises(BadInput, match="patched already"): wb.patch(backbone)
    assert torch.equal(run(backbone, inputs), want)


@pytest.mark.parametrize("call", [wb.unpatch, wb.get_patch, lambda m: wb.save_patch(m, "x")])
def test_not_patched(backbone, call):
    with pytest.raises(BadInput, match="is not patched"): call(backbone)


def test_unsupported_model():
    with pytest.raises(BadInput, match="Linear is not a known backbone.*register_backbone"): wb.patch(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("config,match", [
    (dict(gate_input="timestp"), "did you mean 'timestep'"), (dict(importance_weight=-1), "importance_weight is -1"), (dict(num_train_timesteps=0), "num_train_timesteps is 0"),
])
def test_bad_config(config, match):
    model = tiny_dit()
    with pytest.raises(BadInput, match=match): wb.patch(model, wb.DMPConfig(**config))
    assert all(w.requires_grad for w in model.parameters()) and PATCH_NAME not in model._modules


@pytest.mark.parametrize("t", [-1, 1000, [3, 1000.5], float("nan")])
def test_timestep_out_of_range(t):
    p = wb.patch(tiny_dit())
    with pytest.raises(BadInput, match="out of range: expected 0 to 999"): p.gates(t)


def damage(folder, what):
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    facts, tensors = json.loads(config.read_text()), load_file(weights)
    if what == "no config": config.unlink()
    elif what == "no weights": weights.unlink()
    elif what == "truncated": weights.write_bytes(weights.read_bytes()[:-5])
    elif what == "garbage": weights.write_bytes(b"not safetensors")
    elif what == "broken json": config.write_text("{")
    elif what == "other method": config.write_text(json.dumps({**facts, "method": "lora"}))
    elif what == "misspelt key": config.write_text(json.dumps({**facts, "gate_inptu": "none"}))
    elif what == "nan": save_file({**tensors, "prompts": tensors["prompts"].fill_(float("nan"))}, weights)
    elif what == "shape": save_file({**tensors, "prompts": tensors["prompts"][:, :3].clone()}, weights)
    elif what == "extra": save_file({**tensors, "more": torch.zeros(1)}, weights)


DAMAGES = {"no config": "no file .*adapter_config.json", "no weights": "no file .*adapter_model.safetensors", "truncated": "not a whole safetensors file",
           "garbage": "not a whole safetensors file", "broken json": "not valid JSON", "other method": "method 'lora': expected 'dmp'",
           "misspelt key": "did you mean 'gate_input'", "nan": "'prompts' holds NaN", "shape": r"\(3, 3, 32\).*expected", "extra": "more"}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_patch_leaves_the_model_alone(what, inputs, tmp_path):
    model = tiny_dit()
    trained(model)
    folder = wb.save_patch(model, tmp_path / "p")
    wb.unpatch(model)
    before, count = run(model, inputs), hooks(model)
    damage(folder, what)
    with pytest.raises(BadInput, match=DAMAGES[what]): wb.load_patch(model, folder)
    assert torch.equal(run(model, inputs), before) and hooks(model) == count and all(w.requires_grad for w in model.parameters())


@pytest.mark.parametrize("other,match", [
    (dict(hidden_size=64), "width 32 there, 64 here"), (dict(num_layers=2), "num_blocks 3 there, 2 here"), (dict(sample_size=16), r"grid_size \[4, 4\] there, \[8, 8\] here"),
])
def test_patch_of_another_shape(other, match, tmp_path):
    source = tiny_dit()
    wb.patch(source)
    wb.save_patch(source, tmp_path / "p")
    with pytest.raises(BadInput, match=match): wb.load_patch(tiny_dit(**other), tmp_path / "p")


def test_patch_of_another_class(tmp_path):
    source = tiny_dit()
    wb.patch(source)
    wb.save_patch(source, tmp_path / "p")
    with pytest.raises(BadInput, match="class DiT there, DiTTransformer2DModel here"): wb.load_patch(tiny_diffusers_dit(), tmp_path / "p")


def test_save_does_not_replace_somebody_elses_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    model = tiny_dit()
    wb.patch(model)
    with pytest.raises(BadInput, match="is not a patch folder"): wb.save_patch(model, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(MissingFile, match="no patch folder"): wb.load_patch(tiny_dit(), tmp_path / "nowhere")


def test_a_registered_backbone_can_be_patched(inputs):
    "A user's own model class, known after one short registration."
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_dit()
            self.config = self.inner.config
        def forward(self, hidden_states, timestep, class_labels=None): return self.inner(hidden_states, timestep, class_labels)
    model = Mine().eval()
    wb.register_backbone(Mine, wb.Anatomy(blocks=lambda m: m.inner.blocks, grid_size=lambda m: m.inner.grid_size, width=lambda m: 32,
                                          embed_timestep=lambda m, t: m.inner.t_embedder(t), embedding_width=lambda m: 32))
    assert "Mine" in wb.supported_models()
    before = run(model, inputs)
    p = wb.patch(model)
    assert torch.equal(run(model, inputs), before)
    randomise(p, 0.5)
    assert not torch.equal(run(model, inputs), before)
