import numpy as np
import pytest
import torch
from conftest import randomise, tiny_dit
from hypothesis import given, settings
from hypothesis import strategies as st

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.methods.hooks import HOOKS_NAME


@torch.no_grad()
def run(model, inputs): return model(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample


def table(steps, channels, ratio, alpha):
    "The masks written another way: a table over all timesteps, filled row by row in NumPy."
    kept = int(channels * ratio)
    starts = (np.linspace(0, 1, steps) ** alpha * (channels - kept)).round().astype(int)
    masks = np.zeros((steps, channels), np.float32)
    for t, s in enumerate(starts): masks[t, s:s + kept] = 1
    return torch.from_numpy(masks)


@pytest.mark.parametrize("channels", [384, 1152])
@pytest.mark.parametrize("ratio,alpha", [(0.8, 4), (0.5, 1), (0.9, 2), (1.0, 4)])
def test_masks_of_all_timesteps_exactly(channels, ratio, alpha):
    assert torch.equal(wb.routing_mask(torch.arange(1000), channels, sharing_ratio=ratio, alpha=alpha),
                       table(1000, channels, ratio, alpha))


@given(st.integers(2, 300), st.integers(8, 200), st.floats(0.2, 1), st.floats(0.5, 8))
@settings(max_examples=50, deadline=None)
def test_masks_of_any_schedule(steps, channels, ratio, alpha):
    m = wb.routing_mask(torch.arange(steps), channels, sharing_ratio=ratio, alpha=alpha, num_train_timesteps=steps)
    assert torch.equal(m, table(steps, channels, ratio, alpha))


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=8), st.floats(0.1, 1))
@settings(max_examples=30, deadline=None)
def test_fractional_timesteps(times, ratio):
    "Any real t has a window of ⌊βC⌋ channels that does not move backwards; beyond T−1 it stands still."
    m = wb.routing_mask(sorted(times), 64, sharing_ratio=ratio)
    starts = m.argmax(1)
    assert (m.sum(1) == int(64 * ratio)).all() and (starts.diff() >= 0).all()
    assert torch.equal(wb.routing_mask([999.0, 999.7, 1000.0], 64, sharing_ratio=ratio),
                       wb.routing_mask([999] * 3, 64, sharing_ratio=ratio))


def test_random_masks():
    m = wb.routing_mask(torch.arange(1000), 96, kind="random")
    assert (m.sum(1) == 76).all() and torch.equal(m, wb.routing_mask(torch.arange(1000), 96, kind="random"))
    assert len({tuple(row.tolist()) for row in m}) == 1000                                  # every timestep has its own
    assert not torch.equal(m, wb.routing_mask(torch.arange(1000), 96, kind="random", seed=1))
    # the nearest whole timestep's
    assert torch.equal(wb.routing_mask([2.6, 3, 3.4], 96, kind="random"), m[[3, 3, 3]])
    # fair: each channel is in the set 76/96 of the time, and neighbours are as alike as strangers
    share, std = m.mean(0), (76 / 96 * 20 / 96 / 1000) ** 0.5
    assert (share - 76 / 96).abs().max() < 5 * std
    near, far = (m[:-1] * m[1:]).sum(1).mean(), (m[:500] * m[500:]).sum(1).mean()
    assert abs(near - 76 * 76 / 96) < 0.5 and abs(far - 76 * 76 / 96) < 0.5
    seeds = torch.stack([wb.routing_mask(torch.arange(300), 96, kind="random", seed=s) for s in range(4)])
    assert all(abs((seeds[i] * seeds[j]).sum(1).mean() - 76 * 76 / 96) < 0.8 for i in range(4) for j in range(i))


def test_nothing_is_stored():
    model = tiny_dit()
    state, before = list(model.state_dict()), sum(b.numel() for b in model.buffers())
    router = wb.route(model)
    assert list(model.state_dict()) == state and sum(b.numel() for b in model.buffers()) == before
    assert not [v for v in vars(router).values() if isinstance(v, torch.Tensor)] and wb.get_router(model) is router
    # routing freezes nothing: it is for training from scratch
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_flow_through_the_channels_of_the_timestep(inputs):
    "With one block the weights that read a masked channel get no gradient."
    model = tiny_dit(num_layers=1).train()
    wb.route(model, wb.DTRConfig(sharing_ratio=0.5, alpha=1.0))
    model(inputs[0][:1], torch.tensor([0]), inputs[2][:1]).sample.square().sum().backward()
    # what is masked still passes by the block
    assert model.x_embedder.proj.weight.grad.abs().sum((1, 2, 3)).gt(0).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dtr", "random"])
def test_compiles_without_a_graph_break(kind, inputs):
    model = tiny_dit()
    wb.route(model, wb.DTRConfig(kind=kind))
    want = run(model, inputs)
    with torch.no_grad(): assert torch.allclose(torch.compile(model, fullgraph=True)(*inputs).sample, want, atol=1e-5)


@pytest.mark.slow
def test_patched_and_routed_compiles_without_a_graph_break(inputs):
    model = tiny_dit()
    randomise(wb.patch(model, wb.DMPConfig(mode="prepend", num_prompts=3, top_k=2, gate_input="condition")), 0.5)
    randomise(wb.patch(model, wb.DMPConfig(num_prompts=5), "other"), 0.5)
    wb.route(model)
    want = run(model, inputs)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(*inputs).sample, want, atol=1e-5)
        with wb.patch_disabled(model, "other"):
            assert torch.allclose(compiled(*inputs).sample, run(model, inputs), atol=1e-5)


def test_routed_twice_and_not_at_all(inputs):
    model = tiny_dit()
    with pytest.raises(BadInput, match="is not routed: call dmp_wb.route"): wb.unroute(model)
    wb.route(model)
    want = run(model, inputs)
    with pytest.raises(BadInput, match="is routed already"): wb.route(model)
    assert torch.equal(run(model, inputs), want)


@pytest.mark.parametrize("config,match", [
    (dict(sharing_ratio=0), r"sharing_ratio is 0: expected a number in \(0, 1\]"),
    (dict(sharing_ratio=1.01), "sharing_ratio is 1.01"), (dict(sharing_ratio=float("nan")), "sharing_ratio is nan"),
    (dict(sharing_ratio="0.8"), "sharing_ratio is 0.8: expected a number"),
    (dict(alpha=0), "alpha is 0: expected a number > 0"), (dict(kind="rtr"), "unknown kind of route 'rtr'"),
    (dict(num_train_timesteps=1), "num_train_timesteps is 1"),
])
def test_bad_config(config, match, inputs):
    model = tiny_dit()
    before = run(model, inputs)
    with pytest.raises(BadInput, match=match): wb.route(model, wb.DTRConfig(**config))
    with pytest.raises(BadInput, match=match): wb.routing_mask([0], 64, wb.DTRConfig(**config))
    assert torch.equal(run(model, inputs), before) and not hasattr(model, HOOKS_NAME)


def test_bad_arguments():
    with pytest.raises(BadInput, match="timestep -1 is out of range"): wb.routing_mask([5, -1], 64)
    with pytest.raises(BadInput, match="timestep nan is out of range"): wb.routing_mask(float("nan"), 64)
    with pytest.raises(BadInput, match="leaves a channel of 3"): wb.routing_mask([0], 3, sharing_ratio=0.3)
    with pytest.raises(BadInput, match="Linear is not a known backbone.*register_backbone"):
        wb.route(torch.nn.Linear(2, 2))
    model = tiny_dit()
    wb.route(torch.compile(model))
    assert wb.get_router(model) is not None
    with pytest.raises(BadInput, match="called without a timestep: expected the argument 'timestep'"):
        model(torch.zeros(1, 1, 8, 8))
