"""What `wb.sample` costs beside the model: `python tools/benchmarks/walking.py [--batch 2] [--steps 50] [--rounds 21]`.

The shipped digits model, DDIM with guidance: a bare loop with diffusers' scheduler, `wb.sample`, and `wb.sample` of the
model with a patch, whose gates are baked. Rounds alternate in one process; CPU time; ratios to the bare loop of the
same round, median and quartiles. First of all their images are compared. With `--pipeline`: diffusers' DiTPipeline
with a DiT-S/2 and a VAE of almost nothing, and `wb.sample` and that VAE, for the same transformer.
"""
import argparse
import statistics
import time

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel

import dmp_wb as wb
from dmp_wb.core.seeds import seed_of
from dmp_wb.diffusion.schedules import sampler

TARGETS = {"wb.sample": 1.05, "patched and baked": 1.08}


@torch.no_grad()
def bare(model, labels, steps, scale):
    "As one writes it without a library."
    scheduler = sampler("ddim", num_inference_steps=steps)
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed_of(0, "image", i)))
                   for i in range(len(labels))])
    y = torch.tensor(labels)
    both = torch.cat([y, torch.full_like(y, 10)])
    for t in scheduler.timesteps:
        cond, free = model(torch.cat([x, x]), timestep=t.expand(len(both)), class_labels=both).sample.chunk(2)
        x = scheduler.step(free + scale * (cond - free), t, x).prev_sample
    return x


def digits(batch: int, steps: int) -> dict:
    "Kinds of drawing digits."
    labels = [i % 10 for i in range(batch)]
    plain, patched = (wb.load_model("digits-base", device="cpu") for _ in range(2))
    patch = wb.patch(patched)
    with torch.no_grad():
        for w in patch.parameters(): w.normal_(std=0.02)
    patched.eval()
    draw = lambda model: lambda: wb.sample(model, class_labels=labels, guidance_scale=1.5, num_inference_steps=steps,
                                           clamp=False, quiet=True)
    return {"bare loop": lambda: bare(plain, labels, steps, 1.5), "wb.sample": draw(plain),
            "patched and baked": draw(patched)}


def pipeline(batch: int, steps: int) -> dict:
    "Kinds of drawing with a DiT-S/2 at 256 × 256 pixels."
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, in_channels=4, out_channels=8,
                                        num_layers=12, sample_size=32).eval()
    vae = AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                        block_out_channels=[4] * 4, layers_per_block=0, norm_num_groups=1, latent_channels=4).eval()
    pipe = DiTPipeline(transformer, vae, sampler("ddim", num_inference_steps=steps))
    pipe.set_progress_bar_config(disable=True)
    labels = [i % 10 for i in range(batch)]

    @torch.no_grad()
    def ours():
        latents = wb.sample(transformer, class_labels=labels, guidance_scale=4.0, num_inference_steps=steps,
                            guidance_channels=3, clamp=False, quiet=True)
        return vae.decode(latents / vae.config.scaling_factor).sample
    draw = lambda: pipe(labels, 4.0, torch.Generator().manual_seed(0), steps, output_type="np").images
    return {"DiTPipeline": draw, "wb.sample": ours}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--pipeline", action="store_true", help="beside DiTPipeline, with a DiT-S/2")
    a = parser.parse_args()
    kinds = (pipeline if a.pipeline else digits)(a.batch, a.steps)
    targets, first = ({"wb.sample": 1.0}, "DiTPipeline") if a.pipeline else (TARGETS, "bare loop")
    if not a.pipeline:
        apart = (kinds["bare loop"]() - kinds["wb.sample"]()).abs().max()
        print(f"largest difference of the images of both loops: {apart:.0e}")
    taken, names = {k: [] for k in kinds}, list(kinds)
    for once in kinds.values(): once()   # warm up
    for r in range(a.rounds):
        for k in (*names[r % len(names):], *names[:r % len(names)]):   # nobody is always first
            start = time.process_time()
            kinds[k]()
            taken[k].append(time.process_time() - start)
    for k in kinds:
        low, middle, high = statistics.quantiles([x / y for x, y in zip(taken[k], taken[first])], n=4)
        target = f"  ≤ {targets[k]:.2f}  {'met' if middle <= targets[k] else 'MISSED'}" if k in targets else ""
        each = 1e3 * statistics.median(taken[k]) / a.steps
        print(f"{k:20}{each:7.2f} ms a step  {middle:.3f} ({low:.3f} to {high:.3f}){target}")


if __name__ == "__main__": main()
