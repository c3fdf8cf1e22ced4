import math

import pytest
import torch
from conftest import tiny_dit

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.methods.lmask import LearnedMask, path
from dmp_wb.methods.settings import LearnedMaskConfig


def sigmoid(v): return 1 / (1 + math.exp(-v)) if v > -700 else 0.0


def naive_start(t, rises, config, channels):
    "Where the window of one timestep begins, in plain Python."
    e = [math.exp(r) for r in rises]
    shares = [v / sum(e) for v in e]
    u = min(max(t / (config.num_train_timesteps - 1), 0), 1)
    piece = min(int(u * len(shares)), len(shares) - 1)
    w = sum(shares[:piece]) + (u * len(shares) - piece) * shares[piece]
    return w ** config.alpha * (channels - int(channels * config.sharing_ratio))


@pytest.mark.parametrize("ratio,alpha", [(0.8, 4.0), (0.5, 1.0), (0.9, 0.5)])
def test_a_new_mask_is_dtrs_at_every_timestep(ratio, alpha):
    mask = LearnedMask.attach_to(tiny_dit(), LearnedMaskConfig(sharing_ratio=ratio, alpha=alpha))
    for channels in (32, 96, 1152):
        assert torch.equal(mask.masks(torch.arange(1000), channels),
                           wb.routing_mask(torch.arange(1000), channels, sharing_ratio=ratio, alpha=alpha))


def test_a_routed_model_and_one_with_a_new_mask_give_the_same_output(backbone, inputs):
    def run(): return backbone(inputs[0], timestep=inputs[1], class_labels=inputs[2]).sample
    with torch.no_grad():
        wb.route(backbone, wb.DTRConfig(sharing_ratio=0.5))
        routed = run()
        wb.unroute(backbone)
        LearnedMask.attach_to(backbone, LearnedMaskConfig(sharing_ratio=0.5)).eval()
        assert torch.equal(run(), routed)


def test_masks_agree_with_the_formula_channel_by_channel():
    config = LearnedMaskConfig(sharing_ratio=0.6, alpha=2.0, knots=5, temperature=0.02)
    mask = LearnedMask.attach_to(tiny_dit(), config)
    torch.nn.init.normal_(mask.mask.rises)
    rises, times, C = mask.mask.rises.double().tolist(), [0, 123, 500, 871, 999], 32
    kept, width = int(C * 0.6), 0.02 * C
    soft, hard = mask.train().mask(torch.tensor(times), C), mask.eval().mask(torch.tensor(times), C)
    for row, t in enumerate(times):
        s = naive_start(t, rises, config, C)
        for c in range(C):
            expected = sigmoid((c + 0.5 - s) / width) * sigmoid((s + kept - c - 0.5) / width)
            assert abs(soft[row, c].item() - expected) < 1e-5
            assert hard[row, c].item() == (round(s) <= c < round(s) + kept)


def test_the_path_rises_from_zero_to_one_whatever_it_has_learned():
    u = torch.linspace(0, 1, 200, dtype=torch.float64)
    w = path(u, torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3)
    assert w[0] == 0 and abs(w[-1] - 1) < 1e-12 and (w.diff() >= 0).all()


def test_it_learns_where_the_window_belongs():
    "Of images that need other channels at t = 500 than DTR gives them there."
    config = LearnedMaskConfig(sharing_ratio=0.5, alpha=4.0, temperature=0.05)
    mask = LearnedMask.attach_to(tiny_dit(hidden_size=64), config).train()
    wanted, t = 24.0, torch.tensor([500])
    assert mask.mask.starts(t, 64).item() < 3
    optimiser = torch.optim.Adam(mask.parameters(), lr=0.1)
    channels = torch.arange(64)
    goal = ((channels >= wanted) & (channels < wanted + 32)).double()
    for _ in range(150):
        optimiser.zero_grad()
        (mask.mask(t, 64) - goal).square().sum().backward()
        optimiser.step()
    assert abs(mask.mask.starts(t, 64).item() - wanted) < 2 and mask.statistics()["mask_drift"] > 0.1


@pytest.mark.parametrize("setting,said", [(dict(sharing_ratio=0), "above 0, at most 1"), (dict(knots=0), "at least 1"),
                                          (dict(temperature=0.0), "above 0"), (dict(alpha=float("nan")), "above 0"),
                                          (dict(sharing_ratio=0.01), "leaves a channel")])
def test_settings_that_make_no_sense(setting, said):
    model = tiny_dit()
    with pytest.raises(BadInput, match=said): LearnedMask.attach_to(model, LearnedMaskConfig(**setting))
    assert not hasattr(model, "_dmp_wb_hooks") and all(p.requires_grad for p in model.parameters())
