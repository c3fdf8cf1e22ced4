"Shared pieces: tiny models with weights away from their zero initialisation, and a folder for runs."
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""   # the same numbers on every machine
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
from diffusers import DiTTransformer2DModel

from dmp_wb.dit import DiT


def randomise(module, std=0.05, seed=0):
    "Normal weights everywhere, so that nothing is hidden behind a zero-initialised layer."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters(): p.copy_(torch.randn(p.shape, generator=g) * std)
    return module


def tiny_dit(**changes):
    return randomise(DiT(**{**dict(sample_size=8, in_channels=1, hidden_size=32, num_layers=3, num_attention_heads=4, num_classes=10), **changes})).eval()


def tiny_diffusers_dit():
    return randomise(DiTTransformer2DModel(sample_size=8, in_channels=1, out_channels=1, num_layers=3, num_attention_heads=4, attention_head_dim=8,
                                           norm_num_groups=1, num_embeds_ada_norm=10)).eval()


@pytest.fixture(params=[tiny_dit, tiny_diffusers_dit], ids=["DiT", "DiTTransformer2DModel"])
def backbone(request): return request.param()


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 1, 8, 8, generator=g), torch.tensor([0, 300, 600, 999]), torch.tensor([0, 4, 9, 10])


@pytest.fixture(autouse=True)
def runs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DMP_WB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"
