"""Wrote the files beside it, once, with dmp_wb 0.1.0 at commit e5dfa6a: config format 1, before there were wings.

    python tests/format1/write.py      # not again: a later version writes later formats

`runs/` holds finished runs without their checkpoints. `killed/` holds the same runs as a kill after step 6 of 8
leaves them: the checkpoint of step 4, metrics to step 6, no summary and no exported weights. `patches/` holds what
`save_patch` wrote. `experiment.yaml` and `sweep.yaml` are by hand.
"""
import json
import os
import shutil
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
import yaml

import dmp_wb as wb

HERE = Path(__file__).parent

TRAIN = {"steps": 8, "batch_size": 16, "ema_decay": 0.9, "log_every": 3, "log_intervals": 2, "log_with": None,
         "checkpoint_every": 4, "cpu": True}
MODEL = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "learn_sigma": False, "patch_size": 2, "hidden_size": 4,
         "num_layers": 2, "num_attention_heads": 1}
COMMON = {"seed": 3, "data": {"name": "digits"}, "optim": {"lr": 0.01}, "train": TRAIN}
PRETRAIN = {"method": "pretrain", "model": MODEL, **COMMON}
FROM_BASE = {"base": "f1-pretrain", **COMMON}
EXPERIMENTS = {
    "f1-pretrain": {**PRETRAIN, "optim": {"lr": 0.01, "lr_scheduler": "cosine", "lr_warmup_steps": 2,
                                          "max_grad_norm": 1.0}},
    "f1-dtr": {**PRETRAIN, "routing": {"sharing_ratio": 0.75, "alpha": 2.0}},
    "f1-random-dtr-gradvac": {**PRETRAIN, "routing": {"sharing_ratio": 0.5, "kind": "random", "seed": 5},
                              "multitask": {"method": "GradVac", "k": 3}},
    "f1-finetune": {"method": "finetune", **FROM_BASE},
    "f1-prompt-tuning": {"method": "prompt-tuning", **FROM_BASE, "patch": {"mode": "prepend", "num_prompts": 4}},
    "f1-dmp": {"method": "dmp", **FROM_BASE, "patch": {"importance_weight": 0.01}},
    "f1-dmp-top-k-dtr-uw": {"method": "dmp", **FROM_BASE, "patch": {"top_k": 3, "num_prompts": 8, "noisy_gating": True},
                            "routing": {"sharing_ratio": 0.8}, "multitask": {"method": "uw", "k": 4}},
}


def main():
    runs, killed = HERE / "runs", HERE / "killed"
    for folder in (runs, killed, HERE / "patches"): shutil.rmtree(folder, ignore_errors=True)
    os.environ["DMP_WB_RUNS"] = str(runs)
    for name, tree in EXPERIMENTS.items():
        (HERE / f"{name}.yaml").write_text(yaml.safe_dump({"format": 1, **tree}))
        run = wb.train(HERE / f"{name}.yaml")
        (HERE / f"{name}.yaml").unlink()
        left = killed / name
        left.mkdir(parents=True)
        shutil.copy(run.folder / "config.yaml", left)
        shutil.copytree(run.folder / "checkpoints/step-0000004", left / "checkpoints/step-0000004")
        rows = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (left / "metrics.jsonl").write_text("".join(row for row in rows if json.loads(row)["step"] <= 6))
        shutil.rmtree(run.folder / "checkpoints")
    config = runs / "f1-finetune/model/config.json"   # diffusers notes where a model came from, and nobody reads it
    config.write_text(config.read_text().replace(f"{runs}/", ""))
    wb.evaluate_run("f1-dmp", 40, metrics="fid,kid", kid_subsets=3, num_inference_steps=3, quiet=True)
    wb.evaluate_run("f1-pretrain", 40, metrics="fid,kid", kid_subsets=3, num_inference_steps=3, quiet=True)
    wb.sample_run("f1-dmp", 4, sampler="ddim", num_inference_steps=3, quiet=True)
    for name in ("f1-dmp", "f1-dmp-top-k-dtr-uw", "f1-prompt-tuning"):
        wb.save_patch(wb.load_model(name), HERE / "patches" / name)
    torch.manual_seed(0)
    model = wb.load_model("f1-pretrain")
    wb.patch(model, wb.DMPConfig(gate_input="condition", mode="prepend", num_prompts=5, depth=1, init="random"))
    wb.save_patch(model, HERE / "patches/condition")
    answers = {}
    for folder in sorted((HERE / "patches").iterdir()):
        model = wb.load_model("f1-pretrain")
        patch = wb.load_patch(model, folder)
        labels = {"class_labels": torch.tensor([1, 2, 10])} if folder.name == "condition" else {}
        answers[folder.name] = patch.gates(torch.tensor([0, 500, 999]), **labels).tolist()
    shutil.rmtree(runs / ".statistics")   # of the real images, made again where they are missing
    for lock in [*runs.rglob(".*lock")]: lock.unlink()
    versions = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), "cpu": cpu()}
    (HERE / "expected.json").write_text(json.dumps({"versions": versions, "gates": answers}, indent=1) + "\n")


def cpu() -> str:
    "The processor's name, where Linux tells it."
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__": main()
