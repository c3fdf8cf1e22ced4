"""The picture on README's first screen: digits and clothes of the shipped bases without and with their patches, from
the same seeds, over the gates of the patch for slanted digits.

    python tools/readme_picture.py    # writes nbs/images/slanted-digits.png
"""
import io

import matplotlib.pyplot as plt
import torch
from PIL import Image

import dmp_wb as wb
from dmp_wb.core.paths import project_root
from dmp_wb.look import viz

SETTINGS = dict(class_labels=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], guidance_scale=1.5, sampler="dpmsolver++",
                num_inference_steps=25, seed=0, quiet=True)
models = [wb.load_model(name) for name in ("digits-base", "digits-slanted", "fashion-base", "fashion-faded")]
t = torch.arange(0, 1000, 5)
gates = viz.gate_heatmaps(wb.get_patch(models[1]).gates(t), t)

width = gates.get_size_inches()[0]
samples, axes = plt.subplots(4, 10, figsize=(width, width / 10 * 3.8), layout="constrained")
for line, name, model in zip(axes, ("base", "with patch") * 2, models):
    for ax, image in zip(line, wb.sample(model, **SETTINGS)):
        ax.imshow(image[0], cmap="gray", vmin=-1, vmax=1)
        ax.set(xticks=[], yticks=[])
    line[0].set_ylabel(name)


def pixels(figure: plt.Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, facecolor="white")
    return Image.open(buffer).convert("RGB")


parts = [pixels(samples), pixels(gates)]
picture = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
for i, part in enumerate(parts): picture.paste(part, (0, sum(p.height for p in parts[:i])))
picture.save(project_root() / "nbs" / "images" / "slanted-digits.png", optimize=True)
