import math

import pytest
import torch
from backbones import BACKBONES
from conftest import randomise, tiny_dit
from scipy.optimize import linear_sum_assignment

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.methods.settings import SwitchConfig
from dmp_wb.methods.switch import Experts, matched, prior_loss, prior_masks, Switch


def naive_gates(switch, e):
    "p and g of one embedding [D_t], block by block."
    z = torch.nn.functional.silu(e)
    M, k, p, g = switch.config.num_experts, switch.config.top_k, [], []
    for i in range(switch.blocks):
        rows = slice(i * M, (i + 1) * M)
        share = (switch.gate.weight[rows] @ z + switch.gate.bias[rows]).softmax(0)
        best = sorted(range(M), key=lambda j: -share[j].item())[:k]
        p.append(share)
        g.append([share[j] if j in best else 0 for j in range(M)])
    return torch.stack(p), g


@torch.no_grad()
def naive_forward(model, switch, x, t, y):
    "One image at a time, one expert at a time."
    outputs = []
    for one, time, label in zip(x, t, y):
        e = model.t_embedder(time[None])[0]
        c = model.condition(time[None], label[None])
        z = model.x_embedder(one[None]) + model.pos_embed
        _, g = naive_gates(switch, e)
        for i, block in enumerate(model.blocks):
            m = torch.ones_like(z)
            for j in range(switch.config.num_experts):
                expert = switch.experts[i]
                m = m + g[i][j] * (z @ expert.weight[j].T + expert.bias[j])
            if switch.config.shared_expert: m = m + z @ switch.experts[i].weight[-1].T + switch.experts[i].bias[-1]
            z = block(m * z, c) + (1 - m) * z
        outputs.append((z, c))
    return outputs


@pytest.mark.parametrize("shared", [False, True])
def test_a_forward_pass_agrees_with_the_formula_sample_by_sample(inputs, shared):
    model, twin = tiny_dit(), tiny_dit()
    switch = Switch.attach_to(model, SwitchConfig(shared_expert=shared)).eval()
    randomise(switch, 0.2)
    seen = {}
    model.blocks[-1].register_forward_hook(lambda module, args, output: seen.update(z=output))
    with torch.no_grad(): model(inputs[0], timestep=inputs[1], class_labels=inputs[2])
    twin_outputs = naive_forward(twin, switch, *inputs)
    assert torch.allclose(seen["z"], torch.cat([z for z, _ in twin_outputs]), atol=1e-4)


def test_mixing_the_weights_first_is_the_sum_of_the_experts():
    experts = randomise(Experts(4, 6), 1.0)
    z, g = torch.randn(3, 5, 6), torch.rand(3, 4)
    each = torch.stack([z @ w.T + b for w, b in zip(experts.weight, experts.bias)])
    assert torch.allclose(experts(z, g), torch.einsum("bm,mbnd->bnd", g, each), atol=1e-5)
    assert torch.allclose(experts(z, g[:1]), torch.einsum("bm,mbnd->bnd", g[:1].expand(3, 4), each), atol=1e-5)


def test_the_prior_is_dtrs_window_over_the_experts_of_all_blocks():
    masks = prior_masks(torch.arange(1000), 12, SwitchConfig(num_experts=3, top_k=2))
    for t in (0, 500, 800, 999):
        start = round((t / 999) ** 4 * 12)
        assert masks[t].tolist() == [float(start <= j < start + 24) for j in range(36)]
    assert (prior_masks(torch.arange(1000), 7, SwitchConfig(num_experts=5, top_k=5)) == 1).all()


def test_the_assignment_has_the_least_distance():
    g = torch.Generator().manual_seed(0)
    use = (torch.rand(1000, 18, generator=g) < 0.66).float()
    prior = prior_masks(torch.arange(1000), 6, SwitchConfig())
    cost = torch.tensor([[(a - b).abs().sum().item() for b in prior.T] for a in use.T])
    rows, columns = linear_sum_assignment(cost.numpy())
    found = matched(use, prior)
    distance = lambda way: sum(cost[i, j].item() for i, j in enumerate(way.tolist()))
    assert distance(found) == pytest.approx(cost.numpy()[rows, columns].sum())
    assert sorted(found.tolist()) == list(range(18))


def test_the_prior_loss_agrees_with_the_formula(inputs):
    model = tiny_dit()
    switch = randomise(Switch.attach_to(model, SwitchConfig()), 0.5)
    model.train()
    model(inputs[0], timestep=inputs[1], class_labels=inputs[2])
    with torch.no_grad():
        embed = model.t_embedder(torch.arange(1000))
        use = torch.tensor([[float(v != 0) for block in naive_gates(switch, e)[1] for v in block] for e in embed])
        columns = matched(use, prior_masks(torch.arange(1000), 3, switch.config))
        total = 0.0
        for t in inputs[1]:
            p = (naive_gates(switch, model.t_embedder(t[None])[0])[0] / 3).flatten().tolist()
            row = prior_masks(t[None], 3, switch.config)[0, columns]
            q = (row / row.sum()).tolist()
            for a, b in zip(p, q):
                total += 0.5 * sum(v * math.log(v / ((a + b) / 2)) for v in (a, b) if v > 0)
    loss = switch.losses()["prior"]
    assert loss[0].item() == pytest.approx(total / len(inputs[1]), rel=1e-4) and loss[1] == 1.0


def test_the_prior_loss_alone_leads_the_gates_to_the_window():
    model = tiny_dit()
    torch.manual_seed(0)
    switch = Switch.attach_to(model, SwitchConfig())
    model.train()
    optimiser, g = torch.optim.Adam(switch.gate.parameters(), lr=0.02), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(40):
        t = torch.randint(1000, (64,), generator=g)
        switch.newest, switch.newest_t = switch._probabilities(model, t), t
        optimiser.zero_grad()
        loss = prior_loss(switch)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_experts_learn_although_they_start_at_zero(inputs):
    model = tiny_dit()
    switch = Switch.attach_to(model, SwitchConfig())
    model.train()
    (model(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample ** 2).mean().backward()
    assert all(e.weight.grad.abs().sum() > 0 and e.bias.grad.abs().sum() > 0 for e in switch.experts)
    assert all(p.requires_grad and p.grad is not None for p in model.blocks.parameters())
    assert {"expert_entropy", "expert_use"} == switch.statistics().keys()
    assert all(0 < v <= 1.1 for v in switch.statistics().values())


def test_a_u_net_has_no_blocks_for_experts():
    with pytest.raises(BadInput, match="expected a transformer"):
        Switch.attach_to(BACKBONES["UNet2DModel"](), SwitchConfig())


def test_number_of_parameters():
    model = wb.DiT(sample_size=8, in_channels=1, hidden_size=64, num_layers=4, num_attention_heads=4)
    switch = Switch.attach_to(model, SwitchConfig(num_experts=3))
    assert sum(p.numel() for p in switch.parameters()) == 4 * (3 * (64 * 64 + 64) + 3 * 65)
