"""Make the files that ship in `dmp_wb/assets`, from the repository's own recipes.

    python tools/make_assets.py classifier
    python tools/make_assets.py runs/new-base:digits-base

A run is shipped, under the name after the colon, as its config, thinned metrics, summary and averaged weights.
"""
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file

from dmp_wb.core.files import write_json
from dmp_wb.core.paths import assets_folder
from dmp_wb.evaluation.features import train_digit_classifier


def classifier():
    folder = assets_folder() / "digits-classifier"
    folder.mkdir(parents=True, exist_ok=True)
    model, accuracy = train_digit_classifier(seed=0)
    save_file(model.state_dict(), folder / "model.safetensors")
    write_json(folder / "config.json", {"trained_by": "dmp_wb.metrics.train_digit_classifier(seed=0)",
                                        "held_out_images": 360, "held_out_accuracy": accuracy})
    print(f"{folder}: {accuracy:.4f} of the held-out digits")


def run(source: Path, name: str):
    target = assets_folder() / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("config.yaml", "summary.json"): shutil.copy(source / name, target / name)
    for name in ("model", "patch"):
        if (source / name).is_dir(): shutil.copytree(source / name, target / name)
    rows = (source / "metrics.jsonl").read_text().splitlines()
    keep = rows[:: max(1, len(rows) // 200)]
    (target / "metrics.jsonl").write_text("\n".join(keep + ([rows[-1]] if keep[-1] != rows[-1] else [])) + "\n")
    print(f"{target}: {sum(f.stat().st_size for f in target.rglob('*') if f.is_file()):,} bytes")


for what in sys.argv[1:]:
    if what == "classifier": classifier()
    else: run(Path(what.rpartition(":")[0]), what.rpartition(":")[2])
