import copy
import json
import pickle

import pytest
import torch
from conftest import randomise, tiny_dit, tiny_diffusers_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import dmp_wb as wb
from dmp_wb.core.errors import BadInput, MissingFile
from dmp_wb.models.dit import DiT
from dmp_wb.methods.patches import PATCH_NAME


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
    # step and two moments for each patch tensor, for nothing else
    assert sum(len(s) for s in optimizer.state.values()) == 3 * len(before)


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._state_dict_hooks)
               + len(m._load_state_dict_post_hooks) for m in model.modules())


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
    assert (all(torch.equal(v, state[k]) for k, v in backbone.state_dict().items())
            and list(state) == list(backbone.state_dict()))
    assert [n for n, w in backbone.named_parameters() if not w.requires_grad] == [first]


def test_model_saves_as_if_unpatched(backbone, inputs, tmp_path):
    names, before = set(backbone.state_dict()), run(backbone, inputs)
    trained(backbone)
    assert {k for k in backbone.state_dict() if not k.startswith(f"{PATCH_NAME}.")} == names
    backbone.load_state_dict(backbone.state_dict())                 # strict
    backbone.save_pretrained(tmp_path)
    assert torch.equal(run(type(backbone).from_pretrained(tmp_path), inputs), before)


def test_a_patched_model_inside_another_module_loads_strictly(inputs):
    outer = torch.nn.ModuleDict({"net": tiny_dit()})
    trained(outer["net"])
    assert f"net.{PATCH_NAME}.default.prompts" in outer.state_dict()
    outer.load_state_dict(outer.state_dict())
    without = {k: v for k, v in outer.state_dict().items() if f".{PATCH_NAME}." not in k}
    with (pytest.warns(UserWarning, match="no patch 'default' of this DiT"),
          pytest.raises(RuntimeError, match="net.dmp.default.prompts")):
        outer.load_state_dict(without)


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
        # as pipelines do
        assert torch.allclose(backbone(x, timestep=torch.tensor(321).expand(4), class_labels=y).sample, one, atol=1e-6)
        assert p.last_gates.shape[0] == 1
        both = backbone(torch.cat([x, x]), timestep=torch.full((8,), 321),
                        class_labels=torch.cat([y, torch.full((4,), 10)])).sample
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
    assert wb.get_patch(model).prompts.dtype == torch.float32 and model.dtype == torch.bfloat16
    wb.unpatch(model)
    assert ({w.dtype for w in wb.patch(model, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
            and run(model, (inputs[0].bfloat16(), *inputs[1:])).isfinite().all())


@pytest.mark.slow
def test_compiles_without_a_graph_break(inputs):
    model = tiny_dit()
    trained(model)
    want = run(model, inputs)
    with torch.no_grad(): assert torch.allclose(torch.compile(model, fullgraph=True)(*inputs).sample, want, atol=1e-5)


@pytest.mark.slow
def test_compiled_training_step(inputs):
    model = tiny_dit()
    p = trained(model)
    grads = []
    for f in (model, torch.compile(model, fullgraph=True)):
        p.zero_grad()
        (f(*inputs).sample.square().sum() + p.balance_loss()).backward()
        grads.append([w.grad.clone() for w in p.parameters()])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))


# --- all of the method

def test_training_on_a_shared_timestep_counts_every_sample(inputs):
    model = tiny_dit().train()
    p = trained(model, config=wb.DMPConfig(noisy_gating=True))
    run(model, (inputs[0], torch.tensor(500), inputs[2]))
    g = p.last_gates
    assert len(g) == 4 and not torch.allclose(g[0], g[1])             # noise of their own
    model.eval()
    run(model, (inputs[0], torch.tensor(500), inputs[2]))
    assert len(p.last_gates) == 1


def test_top_k(inputs):
    model = tiny_dit()
    p = trained(model, config=wb.DMPConfig(top_k=3))
    with torch.no_grad():
        g = p.gates(torch.arange(1000))
        e_t = model.t_embedder(inputs[1])
        logits = torch.cat([e_t, torch.full((4, 1), 2.0)], 1) @ p.gate.weight.T + p.gate.bias
        want = torch.zeros_like(logits)
        for row in range(4):
            best = sorted(range(16), key=lambda j: -logits[row, j])[:3]
            want[row, best] = logits[row, best].softmax(-1)
    assert ((g > 0).sum(-1) == 3).all() and torch.allclose(g.sum(-1), torch.ones(1000, 3), atol=1e-5)
    assert torch.allclose(p.gates(inputs[1])[:, 2], want, atol=1e-6)
    everything = wb.DMPConfig(top_k=16)
    wb.unpatch(model)
    assert torch.equal(wb.patch(model, everything).gates(5), torch.full((1, 3, 16), 1 / 16))


@pytest.mark.parametrize("depth,blocks",
                         [(None, [0, 1, 2]), (1, [0]), (2, [0, 1]), ([2], [2]), ([2, 0], [0, 2]), ((1,), [1])])
def test_depth(depth, blocks, inputs, tmp_path):
    model = tiny_dit()
    p = trained(model, config=wb.DMPConfig(depth=depth))
    assert (p.blocks == blocks and p.prompts.shape == (len(blocks), 16, 32)
            and p.gates([0, 9]).shape == (2, len(blocks), 16))
    got = run(model, inputs)
    with torch.no_grad():
        z, c, e_t = (model.x_embedder(inputs[0]) + model.pos_embed, model.condition(inputs[1], inputs[2], 4),
                     model.t_embedder(inputs[1]))
        for i, block in enumerate(model.blocks):
            if i in blocks:   # the gate knows the block by its number in the model
                g = (torch.cat([e_t, torch.full((4, 1), float(i))], 1) @ p.gate.weight.T + p.gate.bias).softmax(-1)
                z = z + g[:, :, None] * p.prompts[blocks.index(i)]
            z = block.forward(z, c)
        assert torch.allclose(got, model.unpatchify(model.final_layer(z, c)), atol=1e-5)
    wb.save_patch(model, tmp_path / "p")
    wb.unpatch(model)
    assert wb.load_patch(model, tmp_path / "p").blocks == blocks and torch.equal(run(model, inputs), got)


def test_random_start(inputs):
    torch.manual_seed(0)
    model = tiny_dit()
    before = run(model, inputs)
    p = wb.patch(model, wb.DMPConfig(init="random", noisy_gating=True))
    bound = (6 / ((3 + 16) * 32)) ** 0.5
    assert 0.9 * bound < p.prompts.abs().max() <= bound and abs(p.prompts.mean()) < 0.1 * bound
    assert (p.gate.weight.abs().max() <= (6 / (33 + 16)) ** 0.5 and (p.gate.bias == 0).all()
            and p.w_noise.abs().max() <= (6 / (32 + 16)) ** 0.5)
    assert p.gate.weight.std() > 0.1 and p.w_noise.std() > 0.1 and not torch.equal(run(model, inputs), before)


def test_noisy_gating(inputs):
    model = tiny_dit()
    p = wb.patch(model, wb.DMPConfig(noisy_gating=True))
    assert (p.w_noise.shape == (32, 16) and (p.w_noise == 0).all()
            and sum(w.numel() for w in p.gate_parameters()) == 33 * 16 + 16 + 32 * 16)
    model.train()
    torch.manual_seed(0)
    logs = []
    for _ in range(400):
        run(model, inputs)
        logs.append(p.last_gates.log())
    spread = torch.stack(logs)
    noise = spread - spread.mean(-1, keepdim=True)      # the softmax takes a row's mean away
    std = noise.std() / (1 - 1 / 16) ** 0.5
    assert abs(std - (0.6931 + 0.01)) < 0.01            # ln 2 + 0.01 at the start
    assert not torch.equal(logs[0][:, 0], logs[0][:, 1])
    model.eval()
    run(model, inputs)
    assert torch.equal(p.last_gates, torch.full_like(p.last_gates, 1 / 16))    # none outside training
    randomise(p, 0.5)
    model.train()
    loss = model(*inputs).sample.square().sum() + p.balance_loss()
    loss.backward()
    assert p.w_noise.grad.abs().sum() > 0


def test_load_balance(inputs):
    model = tiny_dit()
    p = trained(model, config=wb.DMPConfig(noisy_gating=True, top_k=4))
    run(model, inputs)
    assert p.load_loss() == 0                            # only in training
    model.train()
    torch.manual_seed(0)
    run(model, inputs)
    got = p.load_loss().item()
    with torch.no_grad():                                # by Monte Carlo: redraw each prompt's own noise
        e_t = model.t_embedder(inputs[1])
        std = torch.nn.functional.softplus(e_t @ p.w_noise) + 0.01
        torch.manual_seed(0)
        load, draws = torch.zeros(16), 4000
        # [B, blocks, n]
        clean = torch.stack(
            [torch.cat([e_t, torch.full((4, 1), float(i))], 1) @ p.gate.weight.T + p.gate.bias for i in range(3)], 1)
        noisy = clean + torch.randn_like(clean) * std[:, None]
        for j in range(16):
            again = noisy.repeat(draws, 1, 1, 1)
            again[..., j] = clean[..., j] + torch.randn(draws, 4, 3) * std[:, None, j]
            load[j] = (again.topk(4, dim=-1).indices == j).any(-1).float().mean(0).sum()
        want = (load.var() / load.mean() ** 2).item()
    # the released code's plain sum is near k whatever the gates do
    assert abs(load.sum() - 4 * 12) < 2.5 and abs(got - want) < 0.05 * want
    (model(*inputs).sample.sum() * 0 + p.load_loss()).backward()
    assert p.gate.weight.grad.abs().sum() > 0


def test_gates_on_the_condition(inputs):
    model = tiny_dit()
    p = trained(model, config=wb.DMPConfig(gate_input="condition"))
    x, t, y = inputs
    run(model, inputs)
    assert torch.allclose(p.gates(t, y), p.last_gates, atol=1e-6) and torch.allclose(
        p.gates(t, class_labels=y.tolist()), p.last_gates, atol=1e-6)
    assert not torch.allclose(p.gates(t, (y + 1) % 10), p.last_gates, atol=1e-3)
    assert torch.allclose(p.gates(t), p.gates(t, torch.full((4,), 10)), atol=1e-6)      # no label: the null class
    assert p.gates(5, y).shape == (4, 3, 16) and p.entropy(5, y).shape == (4, 3)
    with pytest.raises(BadInput, match="gate_input is 'condition'"), p.baked([3]): pass


def test_a_baked_table(inputs):
    x, _, y = inputs
    model = tiny_dit()
    p = trained(model)
    steps = torch.tensor([999, 500, 7])
    calls = []
    model.t_embedder.register_forward_hook(lambda *a: calls.append(1))
    with torch.no_grad():
        want = [model(x, t, y).sample for t in steps] + [model(x, steps[[0, 1, 2, 0]], y).sample]
        with p.baked(steps):
            calls.clear()
            got = [model(x, t, y).sample for t in steps]
            assert len(calls) == 3                       # the model's own; the gates need none
            got.append(model(x, steps[[0, 1, 2, 0]], y).sample)
            with pytest.raises(BadInput, match="timestep 8 is not in the baked table of 3"):
                model(x, torch.tensor(8), y)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], want)) and torch.allclose(got[3], want[3], atol=1e-6)
    calls.clear()
    run(model, inputs)
    assert len(calls) == 2


@pytest.mark.parametrize("changes, flow", [({"gate_input": "timestep+condition"}, {}), ({}, {
    "sampler": "flow-euler", "prediction_type": "flow_prediction"})], ids=["timestep+condition", "flow"])
def test_gates_of_two_inputs_and_models_of_flow_are_sampled(changes, flow):
    "A batch that shares its timestep has conditions of its own; flow matching begins at T."
    model = tiny_dit()
    wb.patch(model, wb.DMPConfig(init="random", **changes))
    images = wb.sample(model, 3, num_inference_steps=2, quiet=True, **flow)
    one = wb.sample(model, 1, [2], first=2, num_inference_steps=2, quiet=True, **flow)
    assert torch.allclose(images[2:], one, atol=1e-5)


def test_the_numbers_of_blocks_follow_the_model_and_are_in_no_file(inputs):
    model = tiny_dit()
    p = randomise(wb.patch(model), 0.3)
    want = run(model, inputs)
    assert not [k for k in model.state_dict() if "block_numbers" in k]
    assert torch.equal(run(copy.deepcopy(model), inputs), want)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    model.to_empty(device="cpu")
    model.load_state_dict(weights)
    assert torch.equal(run(model, inputs), want)
    for dtype in (torch.bfloat16, torch.float32):
        p.to(dtype)
        assert p.block_numbers.dtype == torch.float32 and p.block_numbers.tolist() == p.blocks
    assert p.to("meta").block_numbers.device.type == "meta"


def test_baked_gates_are_not_used_in_training(inputs):
    model = tiny_dit().train()
    p = trained(model)
    with p.baked([5]):
        model(*inputs).sample.sum().backward()
        assert p.gate.weight.grad is not None


def test_size_of_a_dit_xl_2_patch_file():
    with torch.device("meta"): model = DiT.from_name("DiT-XL/2")
    backbone = sum(v.numel() for v in model.state_dict().values())
    for noisy in (False, True):
        p = wb.patch(model, wb.DMPConfig(noisy_gating=noisy))
        assert sum(v.numel() for v in p.state_dict().values()) <= 0.015 * backbone
        wb.unpatch(model)


# --- the hub

def test_hub_files_and_card(inputs, tmp_path):
    model = tiny_dit()
    p = trained(model, config=wb.DMPConfig(top_k=3, gate_input="condition"))
    want = run(model, inputs)
    p.save_pretrained(tmp_path / "p")
    assert {f.name for f in (tmp_path / "p").iterdir()} == {"README.md", "adapter_config.json",
                                                            "adapter_model.safetensors"}
    card = (tmp_path / "p" / "README.md").read_text()
    assert (card.startswith("---\n") and "library_name: dmp_wb" in card and "**DiT**\nwith 3 blocks" in card
            and "| `top_k` | `3` |" in card and "gate on the condition" in card)
    wb.unpatch(model)
    assert wb.PromptPatch.from_pretrained(tmp_path / "p", model=model).config == wb.DMPConfig(top_k=3,
                                                                                              gate_input="condition")
    assert torch.equal(run(model, inputs), want)
    wb.save_patch(model, tmp_path / "p")                              # over it, card and all


def test_push_to_hub(monkeypatch, tmp_path):
    import huggingface_hub.hub_mixin as mixin
    sent = {}

    class Api:
        def __init__(self, **kwargs): sent.update(kwargs)
        def create_repo(self, repo_id, **kwargs): return type("Repo", (), {"repo_id": repo_id})
        def upload_folder(self, *, folder_path, **kwargs):
            sent.update(kwargs, files={f.name: f.read_bytes() for f in folder_path.iterdir()})
    monkeypatch.setattr(mixin, "HfApi", Api)
    p = trained(tiny_dit())
    p.push_to_hub("me/my-patch", token="t", private=True)
    assert (sent["repo_id"] == "me/my-patch" and sent["token"] == "t"
            and set(sent["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"})
    assert (b'wb.load_patch(pipe.transformer, "me/my-patch")' in sent["files"]["README.md"]
            and b"# my-patch" in sent["files"]["README.md"])


def hub_cache(root, repo_id, files, revision="0123456789abcdef0123456789abcdef01234567"):
    "A repository as huggingface_hub keeps it on disk."
    folder = root / f"models--{repo_id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for f in files: (snapshot / f.name).write_bytes(f.read_bytes())
    return snapshot


def test_loading_from_the_hub(inputs, tmp_path):
    model = tiny_dit()
    trained(model)
    want = run(model, inputs)
    hub_cache(tmp_path / "hub", "me/my-patch", wb.save_patch(model, tmp_path / "p").iterdir())
    wb.unpatch(model)
    wb.load_patch(model, "me/my-patch", cache_dir=tmp_path / "hub", local_files_only=True)
    assert torch.equal(run(model, inputs), want)
    wb.unpatch(model)
    with pytest.raises(MissingFile, match="no patch folder me/other, and the hub gave none"):
        wb.load_patch(model, "me/other", cache_dir=tmp_path / "hub", local_files_only=True)


def test_a_patch_remembers_which_model_it_was_made_for(tmp_path):
    tiny_dit().save_pretrained(tmp_path / "m")
    snapshot = hub_cache(tmp_path / "hub", "lab/base", (tmp_path / "m").iterdir())
    for path, want in ((snapshot, {"id": "lab/base", "revision": "0123456789abcdef0123456789abcdef01234567"}),
                       (tmp_path / "m", {})):
        model = DiT.from_pretrained(path)
        wb.patch(model)
        wb.save_patch(model, tmp_path / "p")
        text = (tmp_path / "p" / "adapter_config.json").read_text()
        base = json.loads(text)["base_model"]
        # no path of this machine
        assert {k: base[k] for k in ("id", "revision") if k in base} == want and str(tmp_path) not in text
    assert "base_model: lab/base" in trained(DiT.from_pretrained(snapshot)).generate_model_card().content


# --- checkpoints of the released code

def reference_state(model, depth=2, n=16, gated=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    D = model.config.hidden_size
    extra = {"prompt_embeddings": torch.randn(depth, n, D, generator=g)}
    if gated:
        extra |= {"gate.weight": torch.randn(n, D + 1, generator=g), "gate.bias": torch.randn(n, generator=g),
                  "w_noise": torch.randn(D, n, generator=g)}
    return {**model.state_dict(), **extra}


@pytest.mark.parametrize("mode,gate_input,top_k,gated",
                         [("add", "condition", None, True), ("add", "condition", 3, True),
                          ("prepend", "timestep", None, True), ("add", "condition", None, False)])
def test_import_of_a_training_checkpoint(mode, gate_input, top_k, gated, inputs, tmp_path):
    source = tiny_dit()
    state = reference_state(source, gated=gated)
    settings = OmegaConf.create(
        {"general": {"data_path": None, "iterations": 5, "mixed_precision": True, "lrs": [1e-4, 2]},
         "models": {"vp": {"type": mode, "n": "${general.iterations}"}}})
    optimizer = torch.optim.AdamW(source.parameters())
    torch.save({"model": state, "opt": optimizer.state_dict(), "config": settings}, tmp_path / "0050000.pt")
    model = DiT.from_official(tmp_path / "0050000.pt", num_attention_heads=4)
    assert torch.equal(run(model, inputs), run(source, inputs))
    p = wb.load_reference_patch(model, tmp_path / "0050000.pt", mode=mode, gate_input=gate_input, top_k=top_k)
    assert (torch.equal(p.prompts, state["prompt_embeddings"]) and p.blocks == [0, 1] and p.config.mode == mode
            and not p.training)
    assert p.config.gate_input == (gate_input if gated else "none")
    if gated: assert torch.equal(p.gate.weight, state["gate.weight"]) and torch.equal(p.w_noise, state["w_noise"])
    got = run(model, inputs)
    assert not torch.allclose(got, run(source, inputs), atol=1e-3)
    wb.unpatch(model)
    wb.load_reference_patch(model, state, mode, gate_input, top_k)
    assert torch.equal(run(model, inputs), got)
    wb.save_patch(model, tmp_path / "ours")                # on as a patch folder
    wb.unpatch(model)
    wb.load_patch(model, tmp_path / "ours")
    assert torch.equal(run(model, inputs), got)


def test_import_of_a_routed_model(inputs):
    source = tiny_dit()
    state = {**source.state_dict(),
             **{f"blocks.{i}.routing._unit_mapping": wb.routing_mask(range(1000), 32) for i in range(3)}}
    with pytest.warns(UserWarning, match=r"routing masks: call dmp_wb.route\(model, "
                      r"dmp_wb.DTRConfig\(sharing_ratio=0.78, num_train_timesteps=1000"):
        model = DiT.from_official({"ema": state}, 4)
    assert torch.equal(run(model, inputs), run(source, inputs))


def test_import_of_more_prompts_than_blocks_and_of_a_hydra_cache(inputs, tmp_path):
    """The released class takes 28 rows of prompts by default, and
    Hydra leaves resolved values in the settings that are saved."""
    source = tiny_dit()
    OmegaConf.register_new_resolver("dmp_wb_test_now", lambda form: "2024", use_cache=True, replace=True)
    settings = OmegaConf.create({"dir": "${dmp_wb_test_now:%Y}"})
    assert settings.dir == "2024"                        # fills the cache
    torch.save({"model": reference_state(source, depth=28), "config": settings}, tmp_path / "x.pt")
    model = DiT.from_official(tmp_path / "x.pt", 4)
    assert wb.load_reference_patch(model, tmp_path / "x.pt", mode="prepend").config == wb.DMPConfig(
        mode="prepend", gate_input="timestep", num_prompts=16, depth=3, noisy_gating=True)


def test_import_of_a_model_without_classes(inputs):
    "The released FFHQ models have a label table of one row."
    source = tiny_dit(num_classes=0)
    state = reference_state(source)
    assert state["y_embedder.embedding_table.weight"].shape == (1, 32)
    model = DiT.from_official(state, 4)
    wb.load_reference_patch(model, state)
    with torch.no_grad():
        assert torch.equal(model(inputs[0], inputs[1]).sample,
                           model(inputs[0], inputs[1], torch.zeros(4, dtype=torch.long)).sample)
    assert wb.sample(model, 2, num_inference_steps=2, quiet=True).shape == (2, 1, 8, 8)


class Evil:
    def __reduce__(self): return print, ("code ran",)


def test_a_checkpoint_that_wants_to_run_code(tmp_path, capsys):
    model = tiny_dit()
    torch.save({"model": reference_state(model), "config": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(BadInput,
                       match=r"evil.pt cannot be read.*print, which could run code; allow_pickled_code=True runs it"):
        wb.load_reference_patch(model, tmp_path / "evil.pt")
    assert "code ran" not in capsys.readouterr().out and PATCH_NAME not in model._modules
    wb.load_reference_patch(model, tmp_path / "evil.pt", allow_pickled_code=True)
    assert "code ran" in capsys.readouterr().out


@pytest.mark.parametrize("change,match", [
    (lambda s: s.pop("prompt_embeddings"), "no tensor 'prompt_embeddings'"),
    (lambda s: s.update(prompt_embeddings=torch.zeros(2, 9, 32)),
     "has 9 prompts a block and the model 16 tokens: expected mode='prepend'"),
    (lambda s: s.update(prompt_embeddings=torch.zeros(2, 17, 32)), "has 17 prompts a block"),
    (lambda s: s.update(prompt_embeddings=torch.zeros(2, 16, 64)), r"prompts.*\(2, 16, 64\)"),
    (lambda s: s.pop("gate.bias"), "gate.bias"),
    (lambda s: s["w_noise"].fill_(float("inf")), "'w_noise' holds NaN or infinite"),
    (lambda s: s.update(prompt_embeddings=torch.zeros(16, 32)), "expected .blocks, prompts, width."),
])
def test_a_checkpoint_that_does_not_fit(change, match, inputs):
    model = tiny_dit()
    before, state = run(model, inputs), reference_state(model)
    change(state)
    with pytest.raises(BadInput, match=match): wb.load_reference_patch(model, state)
    assert torch.equal(run(model, inputs), before) and all(w.requires_grad for w in model.parameters())


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
    with pytest.raises(BadInput, match="Linear is not a known backbone.*register_backbone"):
        wb.patch(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("config,match", [
    (dict(gate_input="timestp"), "did you mean 'timestep'"), (dict(importance_weight=-1), "importance_weight is -1"),
    (dict(num_train_timesteps=0), "num_train_timesteps is 0"),
    (dict(mode="append"), "did you mean 'prepend'"), (dict(init="zeros"), "did you mean 'zero'"),
    (dict(load_weight=float("nan")), "load_weight is nan"),
    (dict(top_k=0), "top_k is 0: expected a whole number, at least 1"),
    (dict(top_k=17), "top_k is 17: expected 1 to 16"), (dict(top_k=2.0), "top_k is 2.0: expected a whole number"),
    (dict(num_prompts=17), "num_prompts is 17: expected at most 16, the tokens of block 0, in add mode"),
    (dict(num_prompts=0), "num_prompts is 0"),
    (dict(depth=4), "depth is 4: expected 1 to 3, the model has 3 blocks"), (dict(depth=0), "depth is 0"),
    (dict(depth=[0, 3]), r"depth is \[0, 3\]: expected.*0 to 2"), (dict(depth=[-1]), "depth is"),
    (dict(depth=[]), "depth is"), (dict(depth=[1, 1]), "different block numbers"),
    (dict(depth="all"), "depth is 'all'"), (dict(depth=True), "depth is True"),
    (dict(gate_input="none", top_k=2), "top_k is set, but gate_input is 'none'"),
    (dict(gate_input="none", noisy_gating=True), "noisy_gating is set"),
    (dict(input_size=[8]), r"input_size is \[8\]: expected"), (dict(input_size=[0, 8]), "input_size is"),
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
    elif what == "bad value": config.write_text(json.dumps({**facts, "top_k": 0}))
    elif what == "a list": config.write_text("[]")
    elif what == "too deep": config.write_text(json.dumps({**facts, "depth": 9}))


DAMAGES = {"bad value": "top_k is 0", "a list": "has method \\[\\]", "too deep": "depth is 9: expected 1 to 3",
           "no config": "no file .*adapter_config.json", "no weights": "no file .*adapter_model.safetensors",
           "truncated": "not a whole safetensors file",
           "garbage": "not a whole safetensors file", "broken json": "not valid JSON",
           "other method": "method 'lora': expected 'dmp'",
           "misspelt key": "did you mean 'gate_input'", "nan": "'prompts' holds NaN",
           "shape": r"\(3, 3, 32\).*expected", "extra": "more"}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_patch_leaves_the_model_alone(what, inputs, tmp_path):
    model = tiny_dit()
    trained(model)
    folder = wb.save_patch(model, tmp_path / "p")
    wb.unpatch(model)
    before, count = run(model, inputs), hooks(model)
    damage(folder, what)
    with pytest.raises(BadInput, match=DAMAGES[what]): wb.load_patch(model, folder)
    assert torch.equal(run(model, inputs), before) and hooks(model) == count and all(
        w.requires_grad for w in model.parameters())


@pytest.mark.parametrize("other,match", [
    (dict(hidden_size=64), "width 32 there, 64 here"), (dict(num_layers=2), "num_blocks 3 there, 2 here"),
    (dict(sample_size=16), r"grid_size \[4, 4\] there, \[8, 8\] here"),
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
    with pytest.raises(BadInput, match="class DiT there, DiTTransformer2DModel here"):
        wb.load_patch(tiny_diffusers_dit(), tmp_path / "p")


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
        def forward(self, hidden_states, timestep, class_labels=None):
            return self.inner(hidden_states, timestep, class_labels)
    model = Mine().eval()
    wb.register_backbone(
        Mine, wb.Anatomy(blocks=lambda m: m.inner.blocks, grid_size=lambda m: m.inner.grid_size, width=lambda m: 32,
                         embed_timestep=lambda m, t: m.inner.t_embedder(t), embedding_width=lambda m: 32))
    assert "Mine" in wb.supported_models()
    before = run(model, inputs)
    p = wb.patch(model)
    assert torch.equal(run(model, inputs), before)
    randomise(p, 0.5)
    assert not torch.equal(run(model, inputs), before)
