"""How fast the training loop is: what each ingredient of DMP training brings, and what the loop costs beyond its step.

`python tools/benchmarks/training.py ingredients [--rounds 3]`:
the same loop with the backbone fine-tuned or frozen, images encoded at every step or latents
cached, float32 or bfloat16, compiled or not. DiT-S/2 on 256 × 256 images through a VAE of Stable Diffusion's size;
random weights, which cost the same time.
`python tools/benchmarks/training.py loop [--rounds 20]`:
steps of `train` and steps of a bare PyTorch loop, in turn in one process.
`python tools/benchmarks/training.py reference [--model DiT-S/2] [--batch 4] [--rounds 15] [--precision bf16]
[--compile] [--profile]`:
DMP steps of `train` and of the plain loop of `reference.py`, which is built as the paper's code is, in turn in one
process: CPU time of one thread, on latents of 4 × 32 × 32; `--precision` of both, `--compile` of ours alone.
Figures are ratios within one run: these machines are noisy.
"""
import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

import dmp_wb as wb
import reference as plain
import stepping
from dmp_wb.training import batches
from dmp_wb.core.settings import DataConfig
from dmp_wb.data.cache import write_cache
from dmp_wb.data.sources import DATASETS, ImageData, SourceEntry

SIZE = 256
VARIANTS = {   # name: method, cached, further settings
    "fine-tuning, encoding": ("finetune", False, []),
    "frozen, encoding": ("dmp", False, []),
    "fine-tuning, cached": ("finetune", True, []),
    "frozen, cached": ("dmp", True, []),
    "frozen, cached, compiled": ("dmp", True, ["train.compile=true"]),
    "frozen, cached, bf16": ("dmp", True, ["train.mixed_precision=bf16"]),
    "frozen, cached, compiled, bf16": ("dmp", True, ["train.compile=true", "train.mixed_precision=bf16"]),
}


def prepare(root, images):
    "Images, a VAE, a base and a cache."
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for i in range(images):
        Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(root / "images" / f"{i:03d}.png")
    torch.manual_seed(0)
    AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                  block_out_channels=[128, 256, 512, 512], layers_per_block=2,
                  sample_size=SIZE).save_pretrained(root / "vae")
    wb.DiT.from_name("DiT-S/2", num_classes=None).save_pretrained(root / "base")
    write_cache(DataConfig(name=str(root / "images"), size=SIZE, vae=str(root / "vae"), num_workers=0), root / "cache",
                batch_size=4)


def one(root, name, batch, steps):
    "Images per second of each step but the first three, and peak memory of this process, as JSON."
    method, cached, extra = VARIANTS[name]
    exp = wb.load_experiment(wb.Experiment(name="bench", method=method, base=str(root / "base")),
                             [f"data.name={root / ('cache' if cached else 'images')}",
                              f"data.vae={'null' if cached else root / 'vae'}", f"data.size={SIZE}",
                              f"train.batch_size={batch}", f"train.steps={steps}",
                              "train.log_every=1", "train.log_with=null", "data.num_workers=0", *extra])
    with tempfile.TemporaryDirectory() as d:
        rates = wb.train(exp, folder=Path(d) / "run").metrics()["images_per_second"][3:]
    print(json.dumps({"rates": rates, "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def ingredients(rounds, batch, steps):
    with tempfile.TemporaryDirectory() as d:
        root = Path(d) / "bench"
        prepare(root, 2 * batch)
        found = {name: [] for name in VARIANTS}
        for r in range(rounds):
            for name in VARIANTS:
                done = subprocess.run([sys.executable, __file__, "one", "--root", str(root), "--name", name, "--batch",
                                       str(batch), "--steps", str(steps)], capture_output=True, text=True)
                if done.returncode: raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {r + 1}: {name:32} {statistics.median(found[name][-1]['rates']):7.3f} img/s",
                      file=sys.stderr, flush=True)
    rate = {name: [statistics.median(x["rates"]) for x in runs] for name, runs in found.items()}
    first, torch_threads = next(iter(VARIANTS)), torch.get_num_threads()
    print(f"DiT-S/2, {SIZE} × {SIZE} images, batch {batch}, CPU, {torch_threads} threads, {rounds} rounds of "
          f"{steps - 3} steps; ratios to the first line of the same round")
    print("| | images/s | ratio | lowest–highest | peak memory |\n|---|---|---|---|---|")
    for name, rates in rate.items():
        ratios = [a / b for a, b in zip(rates, rate[first], strict=True)]
        print(f"| {name} | {statistics.median(rates):.2f} | {statistics.median(ratios):.2f} | "
              f"{min(ratios):.2f}–{max(ratios):.2f} | {max(x['memory_gib'] for x in found[name]):.2f} GiB |")


def loop(rounds, batch, per_round=4):
    """The loop's iterator of batches is where its steps can be timed without touching it:
    every few steps, as many bare ones are run in between."""
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randn(512, 4, 32, 32, generator=g), torch.randint(10, (512,), generator=g)
    DATASETS["bench"] = SourceEntry(lambda config: ImageData(images, labels, list("0123456789")))
    exp = wb.load_experiment(wb.Experiment(name="bench"),
                             ["data.name=bench", "model.name=DiT-S/2", "model.num_classes=10",
                              "model.learn_sigma=false", f"train.batch_size={batch}",
                              f"train.steps={(rounds + 1) * per_round + 1}", "train.log_every=25"])
    bare, ratios = bare_loop(batch), []
    original = batches.batches

    def timed(*args):
        begun, n = time.perf_counter(), 0
        for b in original(*args):
            if n and n % per_round == 0:
                own = time.perf_counter() - begun
                begun = time.perf_counter()
                for _ in range(per_round): next(bare)
                other = time.perf_counter() - begun
                if n > per_round: ratios.append(own / other)   # the first round warms up
                begun = time.perf_counter()
            n += 1
            yield b
    batches.batches = timed
    with tempfile.TemporaryDirectory() as d: wb.train(exp, folder=Path(d) / "run")
    q = statistics.quantiles(ratios, n=4)
    print(f"the loop's step against a bare one, DiT-S/2, 4 × 32 × 32 latents, batch {batch}, {torch.get_num_threads()} "
          f"threads, {len(ratios)} rounds of {per_round} steps in turn: median {q[1]:.3f} ×, quartiles "
          f"{q[0]:.3f}–{q[2]:.3f}")


def bare_loop(batch):
    "The same step in plain PyTorch: shuffled latents, noise, forward, mse, backward, gradient norm, AdamW, average."
    data = wb.load_data("bench")
    torch.manual_seed(0)
    model = wb.DiT.from_name("DiT-S/2", num_classes=10, learn_sigma=False).train()
    params = list(model.parameters())
    optimizer, average = (torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True),
                          [p.detach().clone() for p in params])
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    while True:
        for indices in torch.randperm(len(data)).split(batch):
            if len(indices) < batch: continue
            x, y, t = data.images[indices], data.labels[indices], torch.randint(1000, (batch,))
            y = torch.where(torch.rand(batch) < 0.1, 10, y)
            noise, a = torch.randn_like(x), alphas[t].view(-1, 1, 1, 1)
            loss = (model(a.sqrt() * x + (1 - a).sqrt() * noise, timestep=t, class_labels=y).sample
                    - noise).square().mean()
            loss.backward()
            torch.nn.utils.get_total_norm([p.grad for p in params])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(average, [p.detach() for p in params], 1e-4)
            yield loss.item()


def against_reference(name, rounds, batch, profile, kind="dmp", precision="no", compiled=False, per_round=1):
    "At every step of `train`, as many of the plain loop's are taken between, and both timed."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours = wb.DiT.from_name(name)
    with torch.no_grad():
        for p in ours.parameters(): p.add_(torch.randn_like(p), alpha=0.02)   # nothing is multiplied by zero
    images, labels = plain.latents(64)
    with tempfile.TemporaryDirectory() as d:
        ours.save_pretrained(f"{d}/base")
        if kind == "dmp": wb.patch(ours)
        if kind == "dtr": wb.route(ours)
        theirs = plain.steps(plain.Loop(ours, kind, precision=precision), images, labels, batch)
        given = {"dmp": {"method": "dmp", "base": f"{d}/base"}, "dtr": {"methods": {"dtr": wb.DTRConfig()}}}
        exp = wb.load_experiment(wb.Experiment(name="reference", **given.get(kind, {})),
                                 stepping.settings(batch, "train.cpu=true", f"model.name={name}",
                                                   f"train.compile={compiled}",
                                                   f"train.mixed_precision={precision}"))
        taken, begun, clock = [], 0.0, time.process_time

        def at_step(n):
            nonlocal begun
            own, start = clock() - begun, clock()
            for _ in range(per_round): next(theirs)
            # the first two warm up
            if n > 2: taken.append((own, clock() - start))
            begun = clock()
            return n == rounds + 2
        with profiled(profile): stepping.take_steps(exp, images, labels, 1000, at_step)
    q = statistics.quantiles([b / a for a, b in taken], n=4)
    own, other = (1000 * statistics.median(x) for x in zip(*taken))
    print(f"{kind} step of the plain loop against ours, {name}, batch {batch}, {precision=!s}, "
          f"{compiled=}, one thread: {q[1]:.2f} × ({q[0]:.2f} to "
          f"{q[2]:.2f}), {own:.0f} ms and {other:.0f} ms of CPU time, {len(taken)} rounds in turn")


@contextlib.contextmanager
def profiled(on):
    "Prints which operations took the CPU's time, of both loops together."
    if not on:
        yield
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found: yield
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ingredients", "loop", "reference", "one"])
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--kind", choices=plain.KINDS, default="dmp")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "ingredients": ingredients(args.rounds or 3, args.batch or 8, args.steps)
    elif args.what == "loop": loop(args.rounds or 20, args.batch or 8)
    elif args.what == "reference":
        against_reference(args.model, args.rounds or 15, args.batch or 4, args.profile, args.kind, args.precision,
                          args.compile)
    else: one(args.root, args.name, args.batch, args.steps)
