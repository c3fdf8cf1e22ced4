"""Make the files that ship in `dmp_wb/assets`, from the repository's own recipes.

    python tools/make_assets.py digits-classifier
    python tools/make_assets.py fashion-classifier
    python tools/make_assets.py runs/new-base:digits-base
    python tools/make_assets.py --half runs/new-base:fashion-latent-base

A run is shipped, under the name after the colon, as its config, thinned metrics, summary and averaged weights,
with --half a model's in half precision.
"""
import os
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file

from dmp_wb.core.files import write_json
from dmp_wb.core.paths import assets_folder
from dmp_wb.evaluation.features import train_digit_classifier, train_fashion_classifier
from dmp_wb.store.run import load_model


CLASSIFIERS = {"digits-classifier": (train_digit_classifier, 360),
               "fashion-classifier": (train_fashion_classifier, 10_000)}


def classifier(name: str):
    train, held_out = CLASSIFIERS[name]
    model, accuracy = train(seed=0)
    folder = assets_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    write_json(folder / "config.json", {"trained_by": f"dmp_wb.evaluation.features.{train.__name__}(seed=0)",
                                        "held_out_images": held_out, "held_out_accuracy": accuracy})
    print(f"{folder}: {accuracy:.4f} of {held_out:,} held-out images")


def run(source: Path, name: str, half: bool):
    target = assets_folder() / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("config.yaml", "summary.json"): shutil.copy(source / name, target / name)
    for name in ("model", "patch"):
        if (source / name).is_dir(): shutil.copytree(source / name, target / name)
    if half: load_model(source).half().save_pretrained(target / "model")
    for file in target.rglob("*.safetensors"): os.chmod(file, 0o644)   # diffusers lets nobody else read what it writes
    rows = (source / "metrics.jsonl").read_text().splitlines()
    keep = rows[:: max(1, -(-len(rows) // 100))]
    (target / "metrics.jsonl").write_text("\n".join(keep + ([rows[-1]] if keep[-1] != rows[-1] else [])) + "\n")
    print(f"{target}: {sum(f.stat().st_size for f in target.rglob('*') if f.is_file()):,} bytes")


half, names = "--half" in sys.argv, [a for a in sys.argv[1:] if a != "--half"]
for what in names:
    if what in CLASSIFIERS: classifier(what)
    else: run(Path(what.rpartition(":")[0]), what.rpartition(":")[2], half)
