"""The small search behind the digits experiments: every setting that was tried, one line each.

    python nbs/experiments/search_digits.py [steps]

Training seed 101 and sampling seed 102 are used here and nowhere else.
The best of each method are the first digits table of nbs/results.ipynb,
which says that they are the search itself; the other figures that the notebooks report were not searched on.
Writes nbs/experiments/digits-search.csv; settings that stand there already are not run again.
"""
import csv
import sys
import tempfile
from pathlib import Path

import dmp_wb as wb
from dmp_wb.evaluation.extractors import evaluate_digits
from dmp_wb.diffusion.sampling import balanced_labels

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
OUT = Path(__file__).with_name("digits-search.csv")
SETTINGS = (
    [("finetune", lr, None) for lr in (3e-5, 1e-4, 3e-4)]
    + [("prompt-tuning", lr, None) for lr in (3e-4, 1e-3)]
    + [("dmp", 1e-3, 1.0), ("dmp", 1e-3, 0.0), ("dmp", 3e-3, 1.0), ("dmp", 3e-3, 0.1), ("dmp", 3e-3, 0.01),
       ("dmp", 3e-3, 0.001), ("dmp", 1e-2, 1.0), ("dmp", 1e-2, 0.01)]
)


def evaluate(model) -> dict:
    labels = balanced_labels(2000, 10)
    figures = {}
    for scale in (1.5, 1.0):
        images = wb.sample(model, class_labels=labels, guidance_scale=scale, sampler="dpmsolver++",
                           num_inference_steps=25, seed=102, quiet=True)
        e = evaluate_digits(images, labels)
        figures |= {f"frechet_guidance_{scale}": round(e["frechet"], 4),
                    f"accuracy_guidance_{scale}": round(e["accuracy"], 4)}
    return figures


def main():
    done = list(csv.DictReader(OUT.open())) if OUT.exists() else []
    key = lambda r: (r["method"], str(r["lr"]), str(r["importance_weight"]), str(r["steps"]))

    def record(row):
        done.append({k: str(v) for k, v in row.items()})
        with OUT.open("w", newline="") as f:
            w = csv.DictWriter(f, list(done[0]))
            w.writeheader()
            w.writerows(done)
        print(row, flush=True)

    def known(row): return any(key(r) == key(row) for r in done)

    row = {"method": "base", "lr": "", "importance_weight": "", "steps": 0}
    if not known(row): record(row | {"final_mse": "", "strongest_gate": ""} | evaluate(wb.load_model("digits-base")))
    for method, lr, weight in SETTINGS:
        row = {"method": method, "lr": lr, "importance_weight": "" if weight is None else weight, "steps": STEPS}
        if known(row): continue
        overrides = [f"optim.lr={lr}", f"train.steps={STEPS}", "seed=101"] + (
            [] if weight is None else [f"patch.importance_weight={weight}"])
        with tempfile.TemporaryDirectory() as folder:
            run = wb.train(f"digits-{method}", overrides, folder=f"{folder}/run")
            model = wb.load_model(run.folder)
            strongest = round(wb.get_patch(model).gates(list(range(1000))).max().item(), 4) if method == "dmp" else ""
            record(row | {"final_mse": round(run.summary["mse"], 5), "strongest_gate": strongest} | evaluate(model))


if __name__ == "__main__": main()
