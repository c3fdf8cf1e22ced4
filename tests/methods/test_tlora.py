import threading

import pytest
import torch
from backbones import BACKBONES, inputs_for, output
from conftest import randomise, tiny_dit

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.methods.settings import TLoRAConfig
from dmp_wb.methods.tlora import active_rank, gates_of, linear_layers, TimestepLoRA

FORMS = {"experts": TLoRAConfig(rank=2, scales=[1, 2, 4]), "one scale": TLoRAConfig(rank=2, scales=[3]),
         "rank": TLoRAConfig(form="rank", rank=6, min_rank=2)}


def with_lora(config, model=None):
    model = model or tiny_dit()
    lora = TimestepLoRA.attach_to(model, config).eval()
    return model, randomise(lora, 0.2)


@torch.no_grad()
def run(model, inputs): return model(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample


def naive_delta(lora, i, t, gate):
    "s B diag(w(t)) A of a layer at one timestep, one rank after the other."
    c, update = lora.config, lora.updates[i]
    delta = torch.zeros(update.up.shape[0], update.down.shape[1])
    if c.form == "rank":
        acts = (c.rank - c.min_rank) * (1000 - t) // 1000 + c.min_rank
        weights = [1.0 if r < acts else 0.0 for r in range(c.rank)]
    else:
        weights = []
        for s, intervals in enumerate(c.scales):
            for k in range(intervals):
                inside = k * 1000 <= t * intervals < (k + 1) * 1000
                counts = 1.0 if s == len(c.scales) - 1 else gate[s].item()
                weights += [counts if inside else 0.0] * c.rank
    for r, w in enumerate(weights): delta += c.scale * w * torch.outer(update.up[:, r], update.down[r])
    return delta


@pytest.mark.parametrize("form", FORMS)
def test_every_image_sees_weights_with_the_update_of_its_timestep(inputs, form):
    model, lora = with_lora(FORMS[form])
    together = run(model, inputs)
    for n, t in enumerate(inputs[1].tolist()):
        plain = tiny_dit()
        layers = linear_layers(plain, None)
        with torch.no_grad():
            e = model.t_embedder(torch.tensor([t]))[0]
            for i, (block, _, layer) in enumerate(layers):
                gate = None
                if lora.gate is not None:
                    S = lora.gate.scales
                    rows = slice(block * S, (block + 1) * S)
                    gate = (lora.gate.weight[rows] @ e + lora.gate.bias[rows]).softmax(0)
                layer.weight += naive_delta(lora, i, t, gate)
        one = tuple(v[n:n + 1] for v in inputs)
        alone = run(plain, one)
        assert torch.allclose(together[n:n + 1], alone, atol=2e-5)
        assert torch.allclose(run(model, one), alone, atol=2e-5)   # by the acting ranks alone
        with lora.prepared([t]): assert torch.allclose(run(model, one), alone, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_merged_weights_give_what_updates_beside_the_weights_give(inputs, form):
    model, lora = with_lora(FORMS[form])
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    for t in (0, 499, 999):
        shared = inputs[0], torch.tensor(t), inputs[2]
        beside = run(model, shared)
        with lora.prepared([t]):
            assert all("forward" in vars(layer) for layer in lora.linears)
            assert torch.allclose(run(model, shared), beside, atol=1e-5)
            assert torch.equal(run(model, inputs), run(model, inputs))   # samples of their own timesteps go on beside
        assert not any("forward" in vars(layer) for layer in lora.linears)
    assert all(torch.equal(v, plain[k]) for k, v in model.state_dict().items())


def test_samples_with_merged_weights_are_those_without(monkeypatch):
    model, lora = with_lora(FORMS["experts"])
    merged = wb.sample(model, 2, class_labels=[1, 2], num_inference_steps=3, seed=0, quiet=True)
    used = []
    monkeypatch.setattr("dmp_wb.methods.tlora.merged_forward", lambda *a: used.append(1))
    monkeypatch.setattr(TimestepLoRA, "prepared", lambda self, timesteps: torch.no_grad())
    beside = wb.sample(model, 2, class_labels=[1, 2], num_inference_steps=3, seed=0, quiet=True)
    assert torch.allclose(merged, beside, atol=1e-4) and not used


def test_merging_ends_after_an_error_and_in_the_last_of_two_threads(inputs):
    model, lora = with_lora(FORMS["experts"])
    shared = inputs[0], torch.tensor(300), inputs[2]
    beside, found = run(model, shared), []
    with pytest.raises(ZeroDivisionError), lora.prepared([300]): raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in lora.linears)
    with lora.prepared([300]):
        other = threading.Thread(target=lambda: found.append(run(model, shared)))   # not inside: goes on beside
        other.start()
        other.join()
        with lora.prepared([300]): pass
        assert all("forward" in vars(layer) for layer in lora.linears)
    assert torch.equal(found[0], beside)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_layer_with_a_forward_of_someone_elses_is_not_merged(inputs, form):
    model, lora = with_lora(FORMS[form])
    layer = lora.linears[0]
    layer.forward = type(layer).forward.__get__(layer)
    shared = inputs[0], torch.tensor(300), inputs[2]
    beside = run(model, shared)
    with lora.prepared([300]): assert torch.allclose(run(model, shared), beside, atol=1e-5)
    assert "forward" in vars(layer)


def test_ranks_fall_with_the_noise():
    r = active_rank(torch.arange(1000), TLoRAConfig(form="rank", rank=8, min_rank=2))
    assert r.tolist() == [6 * (1000 - t) // 1000 + 2 for t in range(1000)]


def test_only_updates_and_gate_learn(inputs):
    model = tiny_dit()
    lora = TimestepLoRA.attach_to(model, FORMS["experts"])
    learn = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learn and all(n.startswith("dmp_wb_methods.tlora.") for n in learn)
    model.train()
    (model(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample ** 2).mean().backward()
    assert all(u.up.grad.abs().sum() > 0 for u in lora.updates)
    assert not any(p.grad is not None for n, p in model.named_parameters() if n not in learn)
    # 14 ranks a layer, of in + out numbers each, and a gate over two scales in every block
    assert sum(p.numel() for p in lora.parameters()) == 14 * sum(
        v.in_features + v.out_features for v in lora.linears) + 3 * 2 * 33
    rates = lora.learning_rates()
    assert len(rates) == 1 and rates[0][1] == 10.0 and len(rates[0][0]) == 2


def test_layers_that_read_the_timestep_stay_as_they_are():
    for name in BACKBONES:
        names = {n for _, n, _ in linear_layers(BACKBONES[name](), None)}
        assert not [n for n in names if "norm" in n or "emb" in n or "adaLN" in n or "time" in n], name
    assert {n for _, n, _ in linear_layers(tiny_dit(), ["attn"])} == {"attn.qkv", "attn.proj"}


@pytest.mark.parametrize("name", [n for n in BACKBONES if n != "DiT"])
def test_one_update_of_every_backbone_is_its_plain_models_with_other_weights(name):
    "With one interval the update is a plain LoRA, whose sum with the weights is a plain model."
    model = BACKBONES[name]()
    kwargs = inputs_for(name)
    plain = output(model, kwargs)
    lora = TimestepLoRA.attach_to(model, TLoRAConfig(rank=2, scales=[1])).eval()
    assert torch.equal(output(model, kwargs), plain)
    randomise(lora, 0.3)
    updated = output(model, kwargs)
    other = BACKBONES[name]()
    with torch.no_grad():
        for (_, _, layer), update in zip(linear_layers(other, None), lora.updates, strict=True):
            layer.weight += update.up @ update.down
    assert torch.allclose(updated, output(other, kwargs), atol=1e-3, rtol=1e-3) and not torch.allclose(updated, plain)
    lora.remove()
    assert torch.equal(output(model, kwargs), plain) and all(p.requires_grad for p in model.parameters())


def test_gates_of_a_lora_without_a_gate():
    _, lora = with_lora(FORMS["rank"])
    with pytest.raises(BadInput, match="no gate"): gates_of(lora, [0])
    assert lora.panels(torch.arange(0, 1000, 100))[0].kind == "lines"


@pytest.mark.parametrize("setting,said", [
    (dict(form="lora"), "form"), (dict(rank=0), "rank is 0"), (dict(form="rank", rank=2, min_rank=3), "min_rank is 3"),
    (dict(scales=[4, 1]), "rising"), (dict(scales=[]), "rising"), (dict(targets=["nothing"]), "no linear layer"),
    (dict(scale=0), "scale is 0")])
def test_settings_that_make_no_sense(setting, said):
    model = tiny_dit()
    with pytest.raises(BadInput, match=said): TimestepLoRA.attach_to(model, TLoRAConfig(**setting))
    assert not hasattr(model, "_dmp_wb_hooks") and all(p.requires_grad for p in model.parameters())
