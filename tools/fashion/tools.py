"""What the comparisons share: models at any checkpoint, loss
by timestep on the test split, features of samples, figures."""
import functools
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import dmp_wb as wb
from dmp_wb.checkpoints import Run, join_tensors, load_model
from dmp_wb.core import seed_of, write_json
from dmp_wb.data import DataConfig, load_data, load_images
from dmp_wb.evaluation.features import FashionFeatures
from dmp_wb.metrics import frechet_bootstrap, frechet_distance, kernel_distance, precision_recall
from dmp_wb.objectives import diffusion_losses, make_tables
from dmp_wb.sampling import balanced_labels
from dmp_wb.training import make_model, trainable

# of DPM-Solver++; the same noise for all models; bins of the loss by timestep
STEPS, SAMPLING_SEED, BINS = 20, 1000, 10


def fashion(split: str) -> tuple[torch.Tensor, torch.Tensor]: # images [N, 1, 28, 28] in [−1, 1], labels [N]
    "A split, whole; kept as one file of tensors beside the pictures, which are read once."
    kept = Path(f"data/fashion-{split}.safetensors")
    if not kept.is_file():
        data = load_images(DataConfig(name="data/fashion", split=split, size=28, channels=1))
        images = torch.cat([data.batch(rows)["images"] for rows in torch.arange(len(data)).split(1000)])
        save_file({"images": ((images + 1) * 127.5).round().byte(), "labels": data.labels}, kept)
    found = load_file(kept)
    return found["images"].float() / 127.5 - 1, found["labels"]


def at_step(folder: Path, step: int | None = None):
    "The averaged weights of a run, finished or at a checkpoint."
    if step is None: return load_model(folder)
    exp = Run(folder).experiment
    model = make_model(exp, load_data(exp.data))
    checkpoint = folder / "checkpoints" / f"step-{step:07d}"
    tree = json.loads((checkpoint / "state.json").read_text())["ema"]
    shadow = join_tensors(tree, load_file(checkpoint / "ema.safetensors"))["shadow_params"]
    with torch.no_grad():
        for p, average in zip(trainable(model).values(), shadow): p.copy_(average)
    return model.eval()


@functools.cache
def network(): return FashionFeatures()


@torch.no_grad()
def features(images: torch.Tensor) -> torch.Tensor:
    return torch.cat([network().features(part) for part in images.split(500)])


@functools.cache
def real(split: str) -> torch.Tensor: # [N, 96]
    kept = Path(f"data/fashion-{split}-features-{network().weights[:12]}.safetensors")
    if not kept.is_file(): save_file({"features": features(fashion(split)[0])}, kept)
    return load_file(kept)["features"]


@torch.no_grad()
def test_loss(model, exp, draws: int = 1) -> dict: # of each image of the test split: [draws · 10,000]
    """The loss of every test image at stratified timesteps and with noise that are the same for all models.
    Tensors `loss`, `timestep`, `image`."""
    images, labels = fashion("test")
    tables, g = (make_tables(exp.schedule, exp.objective.prediction_type),
                 torch.Generator().manual_seed(seed_of(0, "test-loss")))
    T, found = exp.schedule.num_train_timesteps, []
    for _ in range(draws):
        t = (torch.randperm(len(images), generator=g) * T) // len(images)
        noise = torch.randn(images.shape, generator=g)
        for rows in torch.arange(len(images)).split(500):
            x_t = tables.add_noise(images[rows], noise[rows], t[rows])
            out = model(x_t, tables.model_timestep(t[rows]), labels[rows]).sample
            found.append((diffusion_losses(out, images[rows], noise[rows], t[rows], tables, "constant",
                                           exp.objective.prediction_type)["mse"], t[rows], rows))
    loss, timestep, image = (torch.cat(part) for part in zip(*found))
    return {"loss": loss, "timestep": timestep, "image": image}


def by_timestep(found: dict, base: dict | None = None) -> dict:
    """Mean loss, all and by bin of timesteps; over the images with even numbers (for choosing) and
    odd ones (for reporting); with the paired difference to the base and its standard error."""
    T, out = 1000, {}
    for name, keep in (("all", found["image"] >= 0), ("even", found["image"] % 2 == 0),
                       ("odd", found["image"] % 2 == 1)):
        part = {"loss": round(float(found["loss"][keep].mean()), 6)}
        if base is not None:
            d = (found["loss"] - base["loss"])[keep]
            part |= {"difference": round(float(d.mean()), 7),
                     "standard_error": round(float(d.std() / len(d) ** 0.5), 7)}
            part["difference_by_bin"] = [round(float(d[found["timestep"][keep] * BINS // T == b].mean()), 7)
                                         for b in range(BINS)]
        part["loss_by_bin"] = [round(float(found["loss"][keep & (found["timestep"] * BINS // T == b)].mean()), 6)
                               for b in range(BINS)]
        out[name] = part
    return out


def sampled(model, exp, kept: Path, guidance: float, images: int, chunk: int = 500) -> dict:
    "Features and classes read of so many samples, kept in a folder chunk by chunk; what is there is not drawn again."
    parts = []
    for first in range(0, images, chunk):
        file = kept / f"g{guidance:g}-{first:05d}.safetensors"
        if not file.is_file():
            labels = balanced_labels(chunk, 10, first)
            x = wb.sample(model, class_labels=labels, guidance_scale=guidance, sampler="dpmsolver++",
                          num_inference_steps=STEPS, schedule=exp.schedule,
                          prediction_type=exp.objective.prediction_type, seed=SAMPLING_SEED, first=first,
                          batch_size=250, quiet=True)
            with torch.no_grad(): found = network()(x)
            kept.mkdir(parents=True, exist_ok=True)
            save_file({"features": found["features"].contiguous(),
                       "right": (found["logits"].argmax(1) == labels).byte()}, file)
            if first == 0:
                save_file({"images": ((x[:100] + 1) * 127.5).round().byte()},
                          kept / f"g{guidance:g}-images.safetensors")
        parts.append(load_file(file))
    return {key: torch.cat([p[key] for p in parts]) for key in parts[0]}


def figures(found: dict, rows: bool = True) -> dict:
    "Distances of samples to both splits, from features."
    f = found["features"]
    out = {"images": len(f), "fid_test": frechet_distance(f, real("test")),
           "fid_train": frechet_distance(f, real("train")), "read_as_asked": float(found["right"].float().mean())}
    if rows:
        out["kid_test"], out["kid_test_std"] = kernel_distance(f, real("test"))
        out["precision"], out["recall"] = (float(v) for v in list(_pair(precision_recall(f, real("test")))))
        out["fid_interval"] = frechet_bootstrap({"m": f}, real("test"), strata=torch.arange(len(f)) % 10,
                                                rounds=100)["m"]["interval"]
    return {k: [round(x, 4) for x in v] if isinstance(v, list) else round(v, 5) if isinstance(v, float) else v
            for k, v in out.items()}


def _pair(found): return (found["precision"], found["recall"]) if isinstance(found, dict) else found[:2]


def note(name: str, value: dict): write_json(Path("results") / f"{name}.json", value)
def known(name: str): return json.loads(p.read_text()) if (p := Path("results") / f"{name}.json").is_file() else None
