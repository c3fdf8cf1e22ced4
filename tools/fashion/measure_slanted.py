"""Figures of the shipped patch for slanted digits: Fréchet distances of 2,000 samples to the slanted and the upright
digits with and without the patch, paired by seed, with 95 % intervals over the images.

    python tools/fashion/measure_slanted.py    # writes nbs/experiments/digits-slanted.json
"""
import dmp_wb as wb
from dmp_wb.core.files import write_json
from dmp_wb.core.paths import project_root
from dmp_wb.data.sources import digits, slanted_digits
from dmp_wb.diffusion.sampling import balanced_labels
from dmp_wb.evaluation.distances import frechet_bootstrap
from dmp_wb.evaluation.extractors import classifier_accuracy, extract

N, SEED = 2000, 102
labels, rows = balanced_labels(N, 10), []
real = {"slanted": extract("digits", slanted_digits().images), "upright": extract("digits", digits().images)}
models = {name: wb.load_model(name) for name in ("digits-base", "digits-slanted")}
for scale in (1.0, 1.5):
    drawn = {name: wb.sample(model, class_labels=labels, guidance_scale=scale, sampler="dpmsolver++",
                             num_inference_steps=25, seed=SEED) for name, model in models.items()}
    found = {name: extract("digits", images) for name, images in drawn.items()}
    for target, features in real.items():
        figures = frechet_bootstrap(found, features, against="digits-base", strata=labels, rounds=200)
        rows += [{"model": name, "guidance_scale": scale, "to": target, **f} for name, f in figures.items()]
    for name, images in drawn.items():
        rows.append({"model": name, "guidance_scale": scale, "read_as_asked": classifier_accuracy(images, labels)})
upright = frechet_bootstrap({"upright digits": real["upright"]}, real["slanted"], rounds=200)["upright digits"]
write_json(project_root() / "nbs" / "experiments" / "digits-slanted.json",
           {"samples": N, "sampler": "dpmsolver++", "num_inference_steps": 25, "sampling_seed": SEED,
            "training_seeds": 1, "upright_digits_to_slanted": upright, "rows": rows})
