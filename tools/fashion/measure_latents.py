"""Figures of the models on latents that ship: the VAE's own error, and Fréchet distances of 2,000 samples to the test
split, as it is and faded, without and with the patch, paired by seed, with 95 % intervals over the images.

    python tools/fashion/measure_latents.py    # writes nbs/experiments/fashion-latents.json
"""
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

N, SEED, STEPS, MODELS = 2000, 102, 20, ("fashion-latent-base", "fashion-latent-faded")


def lower_to_upper(images: torch.Tensor) -> float:
    "How bright the lower half of pictures is, as a share of the upper half."
    light = (images + 1).mean((0, 1, 3))
    return float(light[14:].sum() / light[:14].sum())


@torch.no_grad()
def reconstructed(images: torch.Tensor) -> torch.Tensor:
    coder = load_vae("fashion-vae")
    return torch.cat([coder.decode(coder.scale * coder.moments(part).chunk(2, 1)[0]) for part in images.split(500)])


test = fashion_mnist(DataConfig(name="fashion-mnist", split="test")).images
splits = {"as it is": test, "faded": faded(test)}
real, again = {name: extract("fashion", images) for name, images in splits.items()}, reconstructed(test)
rows = []
for scale in (1.0, 1.5):
    drawn = {name: draw(name, N, guidance_scale=scale, sampler="dpmsolver++", num_inference_steps=STEPS, seed=SEED,
                        batch_size=250, quiet=True) for name in MODELS}
    found, labels = {name: extract("fashion", d.images) for name, d in drawn.items()}, drawn[MODELS[0]].labels
    for target, features in real.items():
        figures = frechet_bootstrap(found, features, against=MODELS[0], strata=labels, rounds=100)
        rows += [{"model": name, "guidance_scale": scale, "to": target, **f} for name, f in figures.items()]
    rows += [{"model": name, "guidance_scale": scale, "lower_to_upper": lower_to_upper(d.images),
              "read_as_asked": accuracy_of(fashion_classifier(), d.images, labels)} for name, d in drawn.items()]
write_json(project_root() / "nbs" / "experiments" / "fashion-latents.json",
           {"samples": N, "sampler": "dpmsolver++", "num_inference_steps": STEPS, "sampling_seed": SEED,
            "training_seeds": 1, "reconstruction_mse": float((again - test).square().mean()),
            "reconstructions_to_test": frechet_distance(extract("fashion", again), real["as it is"]),
            "faded_to_test": frechet_distance(real["faded"], real["as it is"]),
            "lower_to_upper": {name: lower_to_upper(images) for name, images in splits.items()}, "rows": rows})
