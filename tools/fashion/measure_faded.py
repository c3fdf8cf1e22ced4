"""Figures of the faded patches that ship, `fashion-faded` on pixels and `fashion-latent-faded` on latents: Fréchet
distances of 2,000 samples to the test split, as it is and faded, without and with the patch, paired by seed, with 95 %
intervals over the images; on latents also the VAE's own error.

    python tools/fashion/measure_faded.py pixels     # writes nbs/experiments/fashion-faded.json
    python tools/fashion/measure_faded.py latents    # writes nbs/experiments/fashion-latents.json
"""
import sys

import torch

from dmp_wb.core.files import write_json
from dmp_wb.core.paths import project_root
from dmp_wb.core.settings import DataConfig
from dmp_wb.data.encoders import load_vae
from dmp_wb.data.sources import faded, fashion_mnist
from dmp_wb.evaluation.distances import frechet_bootstrap, frechet_distance
from dmp_wb.evaluation.draw import draw
from dmp_wb.evaluation.extractors import extract
from dmp_wb.evaluation.features import accuracy_of, fashion_classifier

N, SEED, STEPS = 2000, 102, 20
MODELS = {"pixels": ("fashion-base", "fashion-faded"), "latents": ("fashion-latent-base", "fashion-latent-faded")}
FILES = {"pixels": "fashion-faded.json", "latents": "fashion-latents.json"}


def lower_to_upper(images: torch.Tensor) -> float:
    "How bright the lower half of pictures is, as a share of the upper half."
    light = (images + 1).mean((0, 1, 3))
    return float(light[14:].sum() / light[:14].sum())


@torch.no_grad()
def reconstructed(images: torch.Tensor) -> torch.Tensor:
    coder = load_vae("fashion-vae")
    return torch.cat([coder.decode(coder.scale * coder.moments(part).chunk(2, 1)[0]) for part in images.split(500)])


kind = sys.argv[1] if len(sys.argv) > 1 else "pixels"
models = MODELS[kind]
test = fashion_mnist(DataConfig(name="fashion-mnist", split="test")).images
splits = {"as it is": test, "faded": faded(test)}
real, rows = {name: extract("fashion", images) for name, images in splits.items()}, []
for scale in (1.0, 1.5):
    drawn = {name: draw(name, N, guidance_scale=scale, sampler="dpmsolver++", num_inference_steps=STEPS, seed=SEED,
                        batch_size=250, quiet=True) for name in models}
    found, labels = {name: extract("fashion", d.images) for name, d in drawn.items()}, drawn[models[0]].labels
    for target, features in real.items():
        figures = frechet_bootstrap(found, features, against=models[0], strata=labels, rounds=100)
        rows += [{"model": name, "guidance_scale": scale, "to": target, **f} for name, f in figures.items()]
    rows += [{"model": name, "guidance_scale": scale, "lower_to_upper": lower_to_upper(d.images),
              "read_as_asked": accuracy_of(fashion_classifier(), d.images, labels)} for name, d in drawn.items()]
report = {"samples": N, "sampler": "dpmsolver++", "num_inference_steps": STEPS, "sampling_seed": SEED,
          "training_seeds": 1, "faded_to_test": frechet_distance(real["faded"], real["as it is"]),
          "lower_to_upper": {name: lower_to_upper(images) for name, images in splits.items()}, "rows": rows}
if kind == "latents":
    again = reconstructed(test)
    report |= {"reconstruction_mse": float((again - test).square().mean()),
               "reconstructions_to_test": frechet_distance(extract("fashion", again), real["as it is"])}
write_json(project_root() / "nbs" / "experiments" / FILES[kind], report)
