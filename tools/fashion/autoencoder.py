"""A small AutoencoderKL on Fashion-MNIST: 1 × 28 × 28 images → latents 4 × 7 × 7, resumable.

    python tools/fashion/autoencoder.py FOLDER [STEPS]

FOLDER gets the model as diffusers saves it, in half precision, and report.json. The loss is that of Kingma and Welling
(arXiv 1312.6114) with a small weight on the divergence, as latent diffusion takes it (arXiv 2112.10752), without its
perceptual and adversarial terms.
"""
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from dmp_wb.config.experiment import DataConfig
from dmp_wb.core.bars import progress
from dmp_wb.core.files import write_json
from dmp_wb.core.seeds import seed_of
from dmp_wb.data.sources import fashion_mnist

BATCH, RATE, KL = 64, 2e-3, 1e-4


def small_autoencoder() -> AutoencoderKL:
    "165,000 parameters, factor 4, without attention."
    return AutoencoderKL(in_channels=1, out_channels=1, latent_channels=4, sample_size=28, layers_per_block=1,
                         down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
                         block_out_channels=(8, 16, 32), norm_num_groups=8, mid_block_add_attention=False)


def loss_of(model: AutoencoderKL, images: torch.Tensor, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    "The error of a reconstruction, an image's sum, and the divergence of its latents from a normal distribution."
    moments = model.encode(images).latent_dist
    latents = moments.mean + moments.std * torch.randn(moments.mean.shape, generator=g)
    error = F.mse_loss(model.decode(latents).sample, images, reduction="sum") / len(images)
    return error, moments.kl().mean()


@torch.no_grad()
def measured(model: AutoencoderKL, images: torch.Tensor) -> dict:
    "Of reconstructions of images: mean square error, and of their latents the deviation that scales them to one."
    parts = [model.encode(part).latent_dist.mode() for part in images.split(500)]
    again = torch.cat([model.decode(part).sample for part in parts])
    return {"mse": float(F.mse_loss(again.clamp(-1, 1), images)), "std": float(torch.cat(parts).std())}


def train(folder: Path, steps: int, seed: int = 0):
    images = fashion_mnist(DataConfig(name="fashion-mnist", split="train")).images
    held_out = fashion_mnist(DataConfig(name="fashion-mnist", split="test")).images
    torch.manual_seed(seed_of(seed, "autoencoder-init"))
    model = small_autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    g, state, first = torch.Generator().manual_seed(seed_of(seed, "autoencoder")), folder / "state.pt", 0
    if state.is_file():
        s = torch.load(state, weights_only=True)
        first = s["step"]
        for part, name in ((model, "model"), (optimizer, "optimizer"), (rate, "rate")): part.load_state_dict(s[name])
        g.set_state(s["generator"])
    folder.mkdir(parents=True, exist_ok=True)
    started, bar = time.process_time(), progress(range(first, steps), desc="autoencoder", initial=first, total=steps)
    for step in bar:
        rows = torch.randint(len(images), (BATCH,), generator=g)
        error, kl = loss_of(model, images[rows], g)
        (error + KL * 784 * kl / 196).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step(); rate.step(); optimizer.zero_grad()
        if step % 200 == 0: bar.set_postfix(error=f"{float(error):.1f}", kl=f"{float(kl):.0f}")
        if (step + 1) % 500 == 0:
            torch.save({"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "rate": rate.state_dict(), "generator": g.get_state()}, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)
    found = measured(model.eval(), held_out)
    model.register_to_config(scaling_factor=round(1 / found["std"], 4))
    model.half().save_pretrained(folder)
    write_json(folder / "report.json", {"steps": steps, "batch_size": BATCH, "seed": seed, "test_mse": found["mse"],
               "parameters": sum(p.numel() for p in model.parameters()),
               "cpu_seconds": round(time.process_time() - started)})
    print(json.dumps(json.loads((folder / "report.json").read_text())))


if __name__ == "__main__": train(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 6000)
