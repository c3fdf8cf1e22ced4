"""Figures of the slanted patch: distances of 1,000 samples to the 1,797
slanted and to the 1,797 upright digits, with and without the patch.

    python long/measure_slanted.py [RUN ...]     # runs/digits-slanted if none is named; results/digits-slanted.json
"""
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from slanted import sheared

import dmp_wb as wb
from dmp_wb.data import digits
from dmp_wb.metrics import classifier_accuracy, digit_classifier, extract, frechet_distance
from dmp_wb.sampling import balanced_labels

N, OUT = 1000, Path("results/digits-slanted.json")
data, network = digits(), digit_classifier()
real = {"upright": extract(network, data.images),
        "slanted": extract(network, ((sheared(data.images) + 1) * 127.5).round() / 127.5 - 1)}
rows = [{"model": "upright real images", "to_slanted": round(frechet_distance(real["upright"], real["slanted"]), 3)}]
labels, grids = balanced_labels(N, 10), {}
runs = sys.argv[1:] or ["runs/digits-slanted"]
models = {"digits-base": wb.load_model("digits-base")} | {f"{Path(run).name}": wb.load_model(run) for run in runs}
for name, model in models.items():
    for scale in (1.0, 1.5):
        images = wb.sample(model, class_labels=labels, guidance_scale=scale, sampler="dpmsolver++",
                           num_inference_steps=25, seed=102, quiet=True)
        found = extract(network, images)
        rows.append({"model": name, "guidance": scale, "to_slanted": round(frechet_distance(found, real["slanted"]), 3),
                     "to_upright": round(frechet_distance(found, real["upright"]), 3),
                     "read_as_asked": classifier_accuracy(images, labels)})
        print(rows[-1], flush=True)
    grids[name] = images[:20]
patch = wb.get_patch(models[Path(runs[0]).name])
if patch is not None and patch.config.gate_input != "none":
    gates = patch.gates([0, 250, 500, 750, 999])
    rows.append({"model": Path(runs[0]).name, "strongest_gate": round(float(gates.max()), 3),
                 "entropy_by_timestep": [round(float(e), 3) for e in patch.entropy([0, 250, 500, 750, 999]).mean(-1)] })
OUT.write_text(json.dumps({"samples": N, "sampler": "dpmsolver++-25", "sampling_seed": 102, "shear": 0.4, "rows": rows},
                          indent=1) + "\n")
sheet = torch.cat([torch.cat(list(g[:, 0]), 1) for g in grids.values()], 0)
Image.fromarray(((sheet + 1) * 127.5).byte().numpy()).resize((sheet.shape[1] * 5, sheet.shape[0] * 5),
                                                             0).save("results/digits-slanted.png")
