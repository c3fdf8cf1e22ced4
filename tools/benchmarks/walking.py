"""What `wb.sample` costs beside the model: `python tools/benchmarks/walking.py [--batch 2] [--steps 50] [--rounds 21]`.

The shipped digits model, DDIM with guidance: a bare loop with diffusers' scheduler, `wb.sample`, and `wb.sample` of the
model with a patch, whose gates are baked. Rounds alternate in one process; CPU time; ratios to the bare loop of the
same round, median and quartiles. First of all their images are compared.
"""
import argparse
import statistics
import time

import torch

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=21)
    a = parser.parse_args()
    labels = [i % 10 for i in range(a.batch)]
    plain, patched = (wb.load_model("digits-base", device="cpu") for _ in range(2))
    patch = wb.patch(patched)
    with torch.no_grad():
        for w in patch.parameters(): w.normal_(std=0.02)
    patched.eval()
    draw = lambda model: lambda: wb.sample(model, class_labels=labels, guidance_scale=1.5, num_inference_steps=a.steps,
                                           clamp=False, quiet=True)
    kinds = {"bare loop": lambda: bare(plain, labels, a.steps, 1.5), "wb.sample": draw(plain),
             "patched and baked": draw(patched)}
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
        low, middle, high = statistics.quantiles([x / y for x, y in zip(taken[k], taken["bare loop"])], n=4)
        target = f"  ≤ {TARGETS[k]:.2f}  {'met' if middle <= TARGETS[k] else 'MISSED'}" if k in TARGETS else ""
        each = 1e3 * statistics.median(taken[k]) / a.steps
        print(f"{k:20}{each:7.2f} ms a step  {middle:.3f} ({low:.3f} to {high:.3f}){target}")


if __name__ == "__main__": main()
