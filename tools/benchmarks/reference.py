"""A plain training loop, as the code that came with the papers is built: what our loop is measured against.

Written from descriptions of that code, for comparison alone. Three kinds: `pretrain` (DiT), `dtr` and `dmp`.
What it keeps of that code's costs, none of which changes a loss in float32:

- DMP: the backbone is not frozen. Gradients of all its weights are computed and kept, and only the prompts and the gate
  are stepped; `zero_grad` knows those alone, so the backbone's gradients pile up.
- DMP: a gate for every block and every sample, one after the other, its largest n of n logits sorted out and put back
  in place, all in the dtype of autocast.
- DMP: attention without flash attention; three numbers of every step are fetched at once, to be added up.
- DTR: a table of T × C floats in every block, made by a loop in Python.
- Every coefficient of the schedule is an array on the host, copied to the device at each use.
- The moving average goes over all parameters of the model, one by one; AdamW in its default form.
- Images are encoded by a VAE at every step where one is given, else latents come from a cache.
- Nothing is compiled, unless `compile` asks for it: the released code of DMP does compile its model, DiT's does not.

Left out of it: what DMP's code does under `noisy_gating` only acts where our patch has that setting too.
In bfloat16 the gates differ from ours, which stay in float32.
"""
import contextlib
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

NO_FLASH = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
KINDS = ("pretrain", "dtr", "dmp")
LATENT_SCALE = 0.18215
T = 1000


class Attention(nn.Module):
    def __init__(self, width, heads, flash):
        super().__init__()
        self.heads, self.flash = heads, flash
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        with contextlib.nullcontext() if self.flash else sdpa_kernel(NO_FLASH):
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)

    def forward(self, x): return self.fc2(self.act(self.fc1(x)))


def modulate(x, shift, scale): return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def mask_table(width, ratio=0.8, alpha=4.0):
    "m_t of every timestep, [T, width]."
    kept, table = int(width * ratio), torch.zeros(T, width)
    for t in range(T):
        start = round((t / (T - 1)) ** alpha * (width - kept))
        table[t, start:start + kept] = 1
    return table


class Block(nn.Module):
    def __init__(self, width, heads, hidden, kind):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, flash=kind != "dmp")
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        if kind == "dtr": self.register_buffer("masks", mask_table(width))

    def forward(self, x, c, t):
        if not hasattr(self, "masks"): return self.inside(x, c)
        m = self.masks[t].unsqueeze(1)
        return self.inside(m * x, c) + (1 - m) * x

    def inside(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TimestepEmbedder(nn.Module):
    def __init__(self, width, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        half = self.frequencies // 2
        waves = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).to(t.device)
        angles = t[:, None].float() * waves[None]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class PlainDiT(nn.Module):
    "A DiT under the names of the official checkpoints; made of one of ours, with its weights."
    def __init__(self, ours, kind="pretrain"):
        super().__init__()
        c = ours.config
        width = c.hidden_size
        self.patch, self.out, self.grid = c.patch_size, c.out_channels, ours.grid_size
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(c.in_channels, width, c.patch_size, stride=c.patch_size)
        self.t_embedder, self.y_embedder = TimestepEmbedder(width), nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(c.num_classes + 1, width)
        self.register_buffer("pos_embed", torch.zeros_like(ours.pos_embed))
        self.blocks = nn.ModuleList(Block(width, c.num_attention_heads, int(width * c.mlp_ratio), kind)
                                    for _ in range(c.num_layers))
        self.final_layer = FinalLayer(width, c.patch_size**2 * c.out_channels)
        self.gates = None
        own = {k: v for k, v in ours.state_dict().items() if not k.startswith("dmp.")}
        missing, unexpected = self.load_state_dict(own, strict=False)
        if unexpected or any(not k.endswith(".masks") for k in missing): raise RuntimeError(f"{missing} {unexpected}")

    def forward(self, x, t, y):
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        e = self.t_embedder(t)
        c, gates = e + self.y_embedder.embedding_table(y), []
        for i, block in enumerate(self.blocks):
            if self.gates is not None:
                x, gate = self.gates(x, c if self.gates.of_condition else e, i)
                gates.append(gate)
            x = block(x, c, t)
        x = self.final_layer(x, c)
        (h, w), p = self.grid, self.patch
        x = x.reshape(len(x), h, w, p, p, self.out)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), self.out, h * p, w * p), gates


class Gates(nn.Module):
    "Prompts of every block and one gate; the number of the block is its last input."
    def __init__(self, blocks, prompts, width, of_condition, noisy):
        super().__init__()
        self.of_condition, self.prompts = of_condition, prompts
        self.prompt_embeddings = nn.Parameter(torch.zeros(blocks, prompts, width))
        self.gate = nn.Linear(width + 1, prompts)
        self.w_noise = nn.Parameter(torch.zeros(width, prompts)) if noisy else None

    def forward(self, x, e, i):
        number = torch.full((len(e), 1), float(i), device=e.device, dtype=e.dtype)
        logits = self.gate(torch.cat([e, number], dim=1))
        if self.w_noise is not None:
            logits = logits + torch.randn_like(logits) * (F.softplus(e @ self.w_noise) + 0.01)
        values, places = logits.topk(self.prompts, dim=1)
        values = values.softmax(dim=-1)
        g = torch.zeros_like(logits, dtype=values.dtype).scatter(1, places, values)
        return x + g.unsqueeze(-1) * self.prompt_embeddings[i], g


def importance(gates):
    "CV² of a prompt's gates, summed over blocks."
    total = sum(g.float() for g in gates)
    return total.var() / (total.mean() ** 2 + 1e-10)


class Diffusion:
    "The linear schedule with a learned variance, its tables as arrays on the host."
    def __init__(self):
        betas = np.linspace(1e-4, 0.02, T, dtype=np.float64)
        bar = np.cumprod(1 - betas)
        before = np.append(1.0, bar[:-1])
        variance = betas * (1 - before) / (1 - bar)
        self.signal, self.noise = np.sqrt(bar), np.sqrt(1 - bar)
        self.of_xt, self.of_epsilon = np.sqrt(1 / bar), np.sqrt(1 / bar - 1)
        self.log_beta, self.log_variance = np.log(betas), np.log(np.append(variance[1], variance[1:]))
        self.mean_x0 = betas * np.sqrt(before) / (1 - bar)
        self.mean_xt = (1 - before) * np.sqrt(1 - betas) / (1 - bar)

    @staticmethod
    def at(table, t, x):
        return torch.from_numpy(table).to(t.device)[t].float().view(-1, *[1] * (x.ndim - 1)).expand_as(x)

    def mean(self, x0, x_t, t): return self.at(self.mean_x0, t, x_t) * x0 + self.at(self.mean_xt, t, x_t) * x_t

    def losses(self, model, x0, y, t, noise):
        "mse + vb [B], and the gates of every block."
        x_t = self.at(self.signal, t, x0) * x0 + self.at(self.noise, t, x0) * noise
        output, gates = model(x_t, t, y)
        if output.shape[1] == x0.shape[1]: return ((noise - output.float()) ** 2).mean(dim=(1, 2, 3)), gates
        epsilon, v = output.float().chunk(2, dim=1)
        share = (v + 1) / 2
        log_p = share * self.at(self.log_beta, t, x0) + (1 - share) * self.at(self.log_variance, t, x0)
        seen = self.at(self.of_xt, t, x0) * x_t - self.at(self.of_epsilon, t, x0) * epsilon.detach()
        mean_p, mean_q = self.mean(seen, x_t, t), self.mean(x0, x_t, t)
        log_q = self.at(self.log_variance, t, x0)
        kl = 0.5 * (log_p - log_q - 1 + (log_q - log_p).exp() + (mean_q - mean_p) ** 2 * (-log_p).exp())
        nll = -discretised(x0, mean_p, 0.5 * log_p)
        mean = lambda z: z.mean(dim=(1, 2, 3)) / math.log(2)
        vb = torch.where(t == 0, mean(nll), mean(kl))
        return ((noise - epsilon) ** 2).mean(dim=(1, 2, 3)) + vb, gates


def discretised(x, mean, log_scale):
    "The log-likelihood of 256 levels, by the tanh approximation of the normal distribution."
    cdf = lambda z: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    centred, inverse = x - mean, torch.exp(-log_scale)
    upper, lower = cdf(inverse * (centred + 1 / 255)), cdf(inverse * (centred - 1 / 255))
    log = lambda p: p.clamp(min=1e-12).log()
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower)))


class Loop:
    "The plain loop of one kind, from the weights of a DiT of ours (and, for DMP, of the patch on it)."
    def __init__(self, ours, kind, device="cpu", precision="no", lr=1e-4, vae=None, dropout=0.1, compile=False):
        if kind not in KINDS: raise ValueError(f"kind is {kind!r}: expected one of {', '.join(KINDS)}")
        self.kind, self.device, self.dropout = kind, torch.device(device), dropout
        self.null = ours.config.num_classes
        self.model = PlainDiT(ours, kind).to(self.device).train()
        groups = self._gates_of(ours, lr) if kind == "dmp" else list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        if compile: self.model.compile()
        self.diffusion, self.vae, self.totals = Diffusion(), None if vae is None else vae.to(self.device).eval(), {}
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.autocast = lambda: contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def _gates_of(self, ours, lr):
        "Put the gates of our patch on the model; gives what the optimiser steps."
        (patch,) = ours.dmp.values()
        noise = patch.w_noise
        gates = Gates(patch.num_blocks, patch.num_prompts, patch.prompts[0].shape[1],
                      of_condition=patch.config.gate_input == "condition", noisy=noise is not None)
        with torch.no_grad():
            gates.prompt_embeddings.copy_(torch.stack([p.detach() for p in patch.prompts]))
            gates.gate.weight.copy_(patch.gate.weight)
            gates.gate.bias.copy_(patch.gate.bias)
            if noise is not None: gates.w_noise.copy_(noise)
        self.model.gates = gates.to(self.device)
        faster = [*gates.gate.parameters(), *([] if noise is None else [gates.w_noise])]
        return [{"params": [gates.prompt_embeddings]}, {"params": faster, "lr": 10 * lr}]

    def loss(self, x0, y, t, noise):
        "What `step` minimises, and its parts: scalars."
        with self.autocast(): each, gates = self.diffusion.losses(self.model, x0, y, t, noise)
        if not gates: return each.mean(), {}
        balance = importance(gates)
        return each.mean() + balance, {"importance": balance, "load": sum((g < 0).sum() for g in gates)}

    def step(self, x, y):
        "One step on images [B, 3, H, W] or latents [B, C, h, w], and labels [B], from the host; gives the loss."
        x, y = x.to(self.device), y.to(self.device)
        if self.vae is not None:
            with torch.no_grad(), self.autocast():
                x = self.vae.encode(x).latent_dist.sample().mul_(LATENT_SCALE)
            x = x.float()
        t = torch.randint(0, T, (len(x),), device=self.device)
        y = torch.where(torch.rand(len(y), device=self.device) < self.dropout, self.null, y)
        loss, parts = self.loss(x, y, t, torch.randn_like(x))
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for name, p in self.model.named_parameters(): self.average[name].mul_(0.9999).add_(p.data, alpha=1e-4)
        for name, value in {"loss": loss, **parts}.items(): self.totals[name] = self.totals.get(name, 0) + value.item()
        return loss


def latents(count, side=32, channels=4, classes=1000, seed=0):
    "Random latents and labels."
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, side, side, generator=g), torch.randint(classes, (count,), generator=g)


def steps(loop, x, y, batch):
    "Endless steps on shuffled data; yields the losses."
    while True:
        for chosen in torch.randperm(len(x)).split(batch):
            if len(chosen) == batch: yield loop.step(x[chosen], y[chosen])
