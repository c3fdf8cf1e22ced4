"Images a second, utilisation, peak memory and waits: our loop and our sampler against the plain ones, in the same run."
import statistics
import time

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel

import dmp_wb as wb
from benchmarks import reference, stepping
from dmp_wb.diffusion.schedules import sampler

from .checks import NoVAE, randomised, TINY
from .device import Window

BATCHES = {"DiT-S/2": 256, "DiT-B/2": 128, "DiT-XL/2": 64}   # images a step on 80 GB
# FLOPs of a step, in forward passes: a frozen backbone needs no gradients of its weights
PASSES = {"dmp": 2, "dtr": 3, "pretrain": 3}


def forward_flops(model: wb.DiT) -> float:
    "Floating point operations of a forward pass of one image: matrix products alone, two for each multiplication."
    c = model.config
    N, D, L, p = model.grid_size[0] * model.grid_size[1], c.hidden_size, c.num_layers, c.patch_size**2
    block = N * D * (4 * D + 2 * int(D * c.mlp_ratio)) + 2 * N * N * D + 6 * D * D
    ends = N * p * (c.in_channels + c.out_channels) * D + 2 * D * D + 256 * D + D * D
    return 2.0 * (L * block + ends)


def usual_batch(here, name: str) -> int:
    "The batch of a size, smaller on a device with less memory."
    if here.tiny: return 4
    if not here.cuda: return 2
    share = torch.cuda.get_device_properties(0).total_memory / (79 * 1e9)
    return max(1, int(BATCHES[name] * min(1.0, 2.0 ** int(torch.tensor(share).log2().floor()))))


class Bench:
    "The variants of one model: its weights on the CPU and on disk, its latents, and the rows that are measured."
    def __init__(self, here, name: str):
        self.here, self.name, self.batch = here, name, usual_batch(here, name)
        self.label = "tiny" if here.tiny else name
        self.made = (wb.DiT(in_channels=4, out_channels=8, **TINY) if here.tiny else wb.DiT.from_name(name))
        with torch.no_grad():
            for p in self.made.parameters(): p.add_(torch.randn_like(p), alpha=0.02)   # no gate of a block is zero
        self.base = here.folder / name.replace("/", "-")
        self.made.save_pretrained(self.base)
        self.classes = self.made.config.num_classes
        self.images, self.labels = reference.latents(4 * self.batch, self.made.config.sample_size, classes=self.classes)
        self.precision = "no" if here.kind == "emu" else "bf16"

    def window(self) -> Window:
        return Window(self.here, 0.0, warm=1) if self.here.tiny else Window(self.here, 3.0)

    def ours(self, kind: str, batch: int, compile: bool = False):
        "Steps of `wb.train`, without its checkpoints."
        given: dict = {"dmp": {"method": "dmp", "base": str(self.base)}, "dtr": {"methods": {"dtr": wb.DTRConfig()}}}
        sizes = [f"model.name={self.name}"]
        if self.here.tiny: sizes = [f"model.{k}={v}" for k, v in {**TINY, "patch_size": 2}.items()]
        exp = wb.load_experiment(wb.Experiment(name="benchmark", **given.get(kind, {})), stepping.settings(
            batch, f"train.mixed_precision={self.precision}", f"train.compile={str(compile).lower()}",
            f"train.cpu={str(self.here.kind == 'cpu').lower()}", *([] if kind == "dmp" else sizes)))
        window = self.window()
        self.here.forget_accelerator()
        try:
            stepping.take_steps(exp, self.images, self.labels, self.classes, window)
            self.here.forget_accelerator(self.here.kind)
        finally: window.close()
        return window

    def plain(self, kind: str, batch: int, compile: bool = False, vae=None):
        "Steps of the plain loop."
        model = wb.DiT.from_pretrained(self.base)
        if kind == "dmp": wb.patch(model)
        loop = reference.Loop(model, kind, self.here.device, self.precision, compile=compile, vae=vae)
        window = self.window()
        x, y, n = self.images, self.labels, 0
        if vae is not None: x = torch.randn(len(x), 3, *(8 * s for s in x.shape[2:])).clamp(-1, 1)
        if self.here.cuda: x, y = x.pin_memory(), y.pin_memory()
        steps = reference.steps(loop, x, y, batch)
        try:
            while not window(n):
                next(steps)
                n += 1
        finally: window.close()
        return window

    def measure(self, what: str, kind: str, run, **settings):
        "A row of one variant; with half the batch where the memory does not hold it."
        batch, need = self.batch, settings.pop("need", 15)
        title = f"{self.label} {kind}: {what}"
        if self.here.left() < need and not self.here.tiny:
            return self.here.skipped(title, f"{self.here.left():.0f} s are left, it takes {need}")
        while True:
            self.here.clear()
            try: window = run(kind, batch, **settings)
            except torch.OutOfMemoryError:
                if batch == 1: raise
                batch //= 2
                continue
            except Exception as e: return self.here.failed(title, e)
            break
        rate = window.steps * batch / window.took
        flops = PASSES[kind] * forward_flops(self.made)
        self.here.row({"task": f"training, {kind}", "model": self.label, "what": what, "precision": self.precision,
                       "batch": batch, "images_per_second": rate,
                       "mfu": rate * flops / self.here.peak if self.here.peak else None, "peak_gib": window.memory,
                       "waits": window.waits, "steps": window.steps})


def training(kind: str, name: str, extra: bool = False):
    "A part: our loop, eager and compiled, against the plain loop."
    def run(here):
        bench = Bench(here, name)
        longer = {"DiT-XL/2": 100}.get(name, 45)
        bench.measure("reference, cached latents", kind, bench.plain, need=20)
        if here.compile: bench.measure("ours, compiled", kind, bench.ours, compile=True, need=longer)
        bench.measure("ours, eager", kind, bench.ours, need=20)
        if not extra: return {}
        bench.measure("reference, VAE in the loop", kind, bench.plain, vae=vae(here), need=20)
        if here.compile: bench.measure("reference, compiled", kind, bench.plain, compile=True, need=longer)
        return {}
    return run


def vae(here) -> AutoencoderKL:
    "Of the size of Stable Diffusion's, with random weights, which cost the same time."
    channels, layers = ([4, 4, 4, 4], 1) if here.tiny else ([128, 256, 512, 512], 2)
    return AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
                         block_out_channels=channels, layers_per_block=layers, norm_num_groups=4 if here.tiny else 32,
                         sample_size=64 if here.tiny else 256)


def diffusers_model(ours: wb.DiT) -> DiTTransformer2DModel:
    c = ours.config
    return DiTTransformer2DModel(num_attention_heads=c.num_attention_heads, patch_size=c.patch_size,
                                 attention_head_dim=c.hidden_size // c.num_attention_heads, in_channels=c.in_channels,
                                 out_channels=c.out_channels, num_layers=c.num_layers, sample_size=c.sample_size,
                                 norm_num_groups=4, num_embeds_ada_norm=c.num_classes)


def samplers(here, name: str, batch: int, steps: int) -> dict:
    "Functions that draw a batch each, with so many steps."
    dtype = torch.float32 if here.kind == "emu" else torch.bfloat16
    tiny = {**TINY, "num_classes": 1000}   # the pipeline's null class is 1000
    make = lambda: wb.DiT(in_channels=4, out_channels=8, **tiny) if here.tiny else wb.DiT.from_name(name)
    plain, patched = make().to(here.device, dtype).eval(), make().to(here.device, dtype).eval()
    randomised(wb.patch(patched), 0.02).eval()
    labels = [i % plain.config.num_classes for i in range(batch)]
    settings = dict(class_labels=labels, guidance_scale=1.5, batch_size=batch, clamp=False, quiet=True)
    ours = lambda model: lambda n=steps: wb.sample(model, num_inference_steps=n, **settings)
    pipe = DiTPipeline(diffusers_model(plain).to(here.device, dtype).eval(), NoVAE().to(here.device),
                       sampler("ddim", num_inference_steps=steps))
    pipe.set_progress_bar_config(disable=True)
    draw = lambda n=steps: pipe(labels, guidance_scale=1.5, num_inference_steps=n, output_type="pt").images
    return {"DiTPipeline of diffusers": draw, "ours, plain": ours(plain),
            "ours, patched, gates from a table": ours(patched)}


def sampling(name: str):
    "A part: images a second of DDIM with guidance, in turn."
    def run(here):
        batch, steps, rounds = (2, 4, 1) if here.tiny else (2, 2, 1) if not here.cuda else (32, 20, 5)
        kinds = samplers(here, name, batch, steps)
        taken: dict = {k: [] for k in kinds}
        for draw in kinds.values(): draw()   # warm up
        for r in range(rounds):
            order = list(kinds)[r % len(kinds):] + list(kinds)[:r % len(kinds)]
            for k in order:
                here.synchronize()
                begun = time.perf_counter()
                kinds[k]()
                here.synchronize()
                taken[k].append(time.perf_counter() - begun)
        for k, draw in kinds.items():
            waits = []
            for n in (steps, 2 * steps):   # what every call waits for falls out of the difference
                with here.waits() as count:
                    draw(n)
                    waits.append(count())
            here.row({"task": f"sampling, {steps} steps of DDIM, guidance 1.5", "model": "tiny" if here.tiny else name,
                      "what": k, "batch": batch, "precision": "no" if here.kind == "emu" else "bf16", "steps": steps,
                      "peak_gib": None, "mfu": None,
                      "images_per_second": batch / statistics.median(taken[k]),
                      "waits": None if None in waits else (waits[1] - waits[0]) / steps})
        return {}
    return run


# name: what, and the seconds that have to be left for it to begin; the most important first
SPEEDS = {"DMP, DiT-XL/2": (training("dmp", "DiT-XL/2", extra=True), 50),
          "DMP, DiT-B/2": (training("dmp", "DiT-B/2"), 30),
          "DMP, DiT-S/2": (training("dmp", "DiT-S/2"), 30),
          "sampling, DiT-XL/2": (sampling("DiT-XL/2"), 40),
          "pre-training, DiT-B/2": (training("pretrain", "DiT-B/2"), 30),
          "pre-training, DiT-XL/2": (training("pretrain", "DiT-XL/2"), 50),
          "DTR, DiT-B/2": (training("dtr", "DiT-B/2"), 30)}
