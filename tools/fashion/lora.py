"""LoRA on the attention of a frozen base, with as many parameters as DMP: the control that issue 16 asks for.
A small loop of its own, with the loop's batches."""
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn.utils import parametrize

from dmp_wb.checkpoints import load_model
from dmp_wb.data import EpochOrder, load_data
from dmp_wb.objectives import diffusion_losses, make_tables
from dmp_wb.training import draw_batch


class LowRank(nn.Module):
    "W → W + B A, zero at the start."
    def __init__(self, weight: torch.Tensor, rank: int):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight): return weight + self.b @ self.a


def with_lora(base, rank: int = 10, seed: int = 0):
    "The base, frozen, with low-rank changes of qkv and proj of each block; and their parameters."
    torch.manual_seed(seed)
    model = load_model(base).requires_grad_(False)
    parameters = []
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj):
            change = LowRank(layer.weight, rank)
            parametrize.register_parametrization(layer, "weight", change, unsafe=True)
            parameters += [change.a, change.b]
    return model, parameters


def train_lora(exp, rank: int, folder: Path, keep: tuple[int, ...]) -> None:
    """Train; `folder/step-N.pt` holds the averaged parameters at
    each step of `keep`, `folder/state.pt` what resuming needs."""
    folder.mkdir(parents=True, exist_ok=True)
    model, parameters = with_lora(exp.base, rank, exp.seed)
    data, tables = load_data(exp.data), make_tables(exp.schedule, exp.objective.prediction_type)
    order = EpochOrder(len(data), exp.train.batch_size, exp.seed)
    optimizer, ema, step = (torch.optim.AdamW(parameters, lr=exp.optim.lr, weight_decay=0.0),
                            EMAModel(parameters, decay=exp.train.ema_decay), 0)
    if (folder / "state.pt").is_file():
        s = torch.load(folder / "state.pt")
        step = s["step"]; optimizer.load_state_dict(s["optimizer"]); ema.load_state_dict(s["ema"])
        with torch.no_grad():
            for p, saved in zip(parameters, s["parameters"]): p.copy_(saved)
    while step < exp.train.steps:
        b = draw_batch(exp, data, order, step, 10)
        out = model(tables.add_noise(b["images"], b["noise"], b["timesteps"]), tables.model_timestep(b["timesteps"]),
                    b["class_labels"]).sample
        diffusion_losses(out, b["images"], b["noise"], b["timesteps"], tables, exp.objective.weighting,
                         exp.objective.prediction_type)["loss"].mean().backward()
        optimizer.step(); optimizer.zero_grad(); ema.step(parameters)
        step += 1
        if step in keep: torch.save(list(ema.shadow_params), folder / f"step-{step}.pt")
        if step % 250 == 0 or step == exp.train.steps:
            torch.save({"step": step, "optimizer": optimizer.state_dict(), "ema": ema.state_dict(),
                        "parameters": [p.detach() for p in parameters]}, folder / "state.tmp")
            (folder / "state.tmp").replace(folder / "state.pt")
            print(f"{folder.name} {step}/{exp.train.steps}", flush=True)


def lora_at(base, rank: int, folder: Path, step: int):
    model, parameters = with_lora(base, rank)
    with torch.no_grad():
        for p, saved in zip(parameters, torch.load(folder / f"step-{step}.pt")): p.copy_(saved)
    return model.eval()
