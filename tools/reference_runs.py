"""Short runs through public names and commands, and their weights, metrics and samples as digests in one JSON file.

    python tools/reference_runs.py figures.json                       # record, with whatever `dmp_wb` is imported
    python tools/reference_runs.py now.json --compare figures.json    # and compare; exit status 1 if anything differs
    python tools/reference_runs.py now.json --compare old.json --batch-format 1   # with figures from before format 2

Equal to the bit on one machine with one version of torch. Experiments are written as files of format 1, which every
later version reads. Two minutes on two cores; no GPU, no network.
"""
import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
               "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}   # read when torch is imported

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import dmp_wb as wb

# Columns of metrics.jsonl that tell of the machine.
OF_THE_MACHINE = ("images_per_second", "memory_gib", "time", "seconds", "when")
LR = 0.01
BATCH_FORMAT: int | None = None   # of all runs; None: the newest that `dmp_wb` has


# ---------------------------------------------------------------------------------------------------------- digests
def digest(tensor: torch.Tensor) -> str:
    "Of a tensor's dtype, shape and bytes."
    t = tensor.detach().cpu().contiguous()
    head = f"{t.dtype}{list(t.shape)}".encode()
    return hashlib.sha256(head + t.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:24]


def file_digest(file: Path) -> str:
    "Of the tensors of a safetensors file with their names; how the file orders them does not count."
    tensors = load_file(file)
    return hashlib.sha256("".join(f"{name} {digest(tensors[name])}\n" for name in sorted(tensors)).encode()).hexdigest()


def image_digest(file: Path) -> str: return digest(torch.from_numpy(np.array(Image.open(file))))


def plain(value):
    "A value as JSON has it, tensors as digests."
    if isinstance(value, torch.Tensor): return digest(value)
    if isinstance(value, np.ndarray): return digest(torch.from_numpy(value))
    if isinstance(value, dict): return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return [plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def rows_of(run: "wb.Run") -> list[dict]:
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in OF_THE_MACHINE} for line in lines]


def figures_of(run: "wb.Run") -> dict:
    """What a run has left: exported weights, lines of metrics, grids of samples, tensors of its newest checkpoint.

    A checkpoint's tensors are counted without their names, which are no promise to anybody.
    """
    exported = sorted(f for part in ("model", "patch") for f in run.folder.glob(f"{part}/**/*.safetensors"))
    newest = max(run.folder.glob("checkpoints/step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    held = [digest(t) for file in sorted(newest.glob("*.safetensors")) for t in load_file(file).values()]
    grids = {f.name: image_digest(f) for f in sorted(run.folder.glob("samples/*.png"))}
    kept = ("status", "steps", "loss", "mse", "trained_parameters", "base_fingerprint")
    summary = {k: run.summary.get(k) for k in kept}
    return {"weights": {str(f.relative_to(run.folder)): file_digest(f) for f in exported}, "metrics": rows_of(run),
            "checkpoint": {"step": newest.name, "tensors": sorted(held)}, "grids": grids, "summary": summary}


# ------------------------------------------------------------------------------------------------------ experiments
def merged(*trees: dict) -> dict:
    out: dict = {}
    for tree in trees:
        for k, v in tree.items():
            out[k] = merged(out[k], v) if isinstance(v, dict) and isinstance(out.get(k), dict) else v
    return out


TRAIN = {"seed": 3, "data": {"name": "digits"}, "optim": {"lr": LR},
         "train": {"steps": 8, "batch_size": 16, "ema_decay": 0.9, "log_every": 2, "log_intervals": 4, "log_with": None,
                   "checkpoint_every": 4, "sample_images": 4, "sample_steps": 4, "cpu": True}}
SIZE = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "learn_sigma": False, "patch_size": 2, "hidden_size": 32,
        "num_layers": 2, "num_attention_heads": 4}
PRETRAIN = merged(TRAIN, {"method": "pretrain", "model": SIZE})
DMP = merged(TRAIN, {"method": "dmp", "base": "pretrain", "patch": {"importance_weight": 0.01}})
TOP_K = {"patch": {"top_k": 3, "num_prompts": 8, "noisy_gating": True, "importance_weight": 0.01, "load_weight": 0.02}}

# Run → its experiment, in the order in which they are trained: bases come first.
EXPERIMENTS = {
    "pretrain": merged(PRETRAIN, {"optim": {"lr_scheduler": "cosine", "lr_warmup_steps": 2, "max_grad_norm": 1.0},
                                  "train": {"steps": 12, "sample_every": 6}}),
    "learn-sigma-min-snr": merged(PRETRAIN, {"model": {"learn_sigma": True}, "schedule": {"name": "cosine"},
                                             "objective": {"weighting": "min-snr"}}),
    "v-p2": merged(PRETRAIN, {"objective": {"weighting": "p2", "prediction_type": "v_prediction"},
                              "optim": {"weight_decay": 0.1, "betas": [0.8, 0.99]}}),
    "flow": merged(PRETRAIN, {"objective": {"prediction_type": "flow_prediction"}, "data": {"flip": True}}),
    "unconditional": merged(PRETRAIN, {"model": {"num_classes": None}, "data": {"conditional": False},
                                       "train": {"keep_best": "loss", "keep_last": 1}}),
    "bf16": merged(PRETRAIN, {"train": {"mixed_precision": "bf16", "gradient_checkpointing": True, "steps": 4}}),
    "finetune": merged(TRAIN, {"method": "finetune", "base": "pretrain", "train": {"gradient_accumulation_steps": 2}}),
    "prompt-tuning": merged(TRAIN, {"method": "prompt-tuning", "base": "pretrain", "patch": {"num_prompts": 4}}),
    "prompt-tuning-prepend": merged(TRAIN, {"method": "prompt-tuning", "base": "pretrain",
                                            "patch": {"mode": "prepend", "num_prompts": 4, "depth": [1]}}),
    "dmp": DMP,
    "dmp-top-k": merged(DMP, TOP_K, {"train": {"sample_every": 8, "gradient_accumulation_steps": 2}}),
    "dmp-condition": merged(DMP, {"patch": {"gate_input": "condition", "mode": "prepend", "num_prompts": 5, "depth": 1,
                                            "init": "random"}, "optim": {"gate_lr_scale": 2}}),
    "dtr": merged(PRETRAIN, {"routing": {"sharing_ratio": 0.75, "alpha": 2.0}, "train": {"sample_every": 8}}),
    "r-tr": merged(PRETRAIN, {"routing": {"sharing_ratio": 0.5, "kind": "random", "seed": 5}}),
    "dmp-on-dtr": merged(DMP, {"base": "dtr"}),
    "dmp-and-dtr": merged(DMP, {"routing": {"sharing_ratio": 0.9}}),
    "uw": merged(PRETRAIN, {"multitask": {"method": "uw", "k": 4}}),
    "uw-dmp-dtr": merged(DMP, TOP_K, {"multitask": {"method": "uw", "k": 4, "clusters": "uniform"},
                                      "routing": {"sharing_ratio": 0.8}}),
    "aggregator": merged(PRETRAIN, {"multitask": {"method": "PCGrad", "k": 3}, "train": {"batch_size": 18}}),
    "aggregator-with-memory": merged(PRETRAIN, {"multitask": {"method": "GradVac", "k": 3},
                                                "train": {"batch_size": 18}}),
    "aggregator-dmp": merged(DMP, TOP_K, {"multitask": {"method": "PCGrad", "k": 3}, "train": {"batch_size": 18}}),
}
# Two processes each: name → what is trained, and after how many steps it is ended and launched again.
LAUNCHED = {"two-pretrain": (merged(PRETRAIN, {"train": {"sample_every": 8}}), None),
            "two-dmp-uw": (merged(DMP, TOP_K, {"multitask": {"method": "uw", "k": 4}}), 4),
            "two-aggregator-dtr": (merged(EXPERIMENTS["aggregator-with-memory"], EXPERIMENTS["r-tr"],
                                          {"train": {"batch_size": 36}}), None)}


def write(name: str, tree: dict) -> Path:
    "An experiment of format 1 as a file, which is named as the run."
    file = Path(f"{name}.yaml")
    noise = {"train": {"batch_format": BATCH_FORMAT}} if BATCH_FORMAT else {}   # older versions know no such key
    file.write_text(yaml.safe_dump({"format": 1, "name": name, **merged(tree, noise)}))
    return file


def steps_logged(folder: Path) -> int:
    with contextlib.suppress(OSError): return len((folder / "metrics.jsonl").read_text().splitlines())
    return 0


def wait_for_steps(folder: Path, steps: int, limit: float = 120) -> bool:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if steps_logged(folder) >= steps: return True
        time.sleep(0.005)
    return False


def train_all(only: list[str]) -> dict:
    figures = {}
    for name, tree in EXPERIMENTS.items():
        if only and name not in only: continue
        if "sample_every" not in tree["train"]: tree = merged(tree, {"train": {"sample_every": None}})
        figures[name] = figures_of(wb.train(write(name, tree)))
        told(name)
    return figures


def train_two(only: list[str]) -> dict:
    figures = {}
    for name, (tree, end) in LAUNCHED.items():
        if only and name not in only: continue
        file = write(name, tree)
        if end: wb.launch(file, [f"train.steps={end}"], num_processes=2)
        figures[name] = figures_of(wb.launch(file, num_processes=2))
        told(name)
    return figures


def resumed(runs: Path) -> dict:
    """Runs that were ended in the middle and went on, beside unbroken ones: killed, stopped by SIGTERM, made longer.

    Where a kill falls differs from time to time; what is left in the end must not.
    """
    long = {"train": {"steps": 120, "log_every": 1, "checkpoint_every": 5}}
    tree = merged(DMP, TOP_K, {"multitask": {"method": "uw", "k": 4}, "routing": {"sharing_ratio": 0.8}}, long)
    figures = {"unbroken": figures_of(wb.train(write("unbroken", tree)))}

    killed = write("killed", tree)
    child = subprocess.Popen([sys.executable, "-m", "dmp_wb", "train", str(killed)], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    try: wait_for_steps(runs / "killed", 23)
    finally:
        child.kill()
        child.wait()
    assert 0 < steps_logged(runs / "killed") < 120, f"the kill came after {steps_logged(runs / 'killed')} steps of 120"
    figures["killed"] = figures_of(wb.train(killed))

    stopped = write("stopped", tree)
    stop = lambda: wait_for_steps(runs / "stopped", 17) and os.kill(os.getpid(), signal.SIGTERM)
    watcher = threading.Thread(target=stop)
    watcher.start()
    run = wb.train(stopped)
    watcher.join()
    assert not run.finished, "SIGTERM came too late"
    figures["stopped"] = figures_of(wb.train(stopped))

    wb.train(write("longer", tree), ["train.steps=7"])
    figures["longer"] = figures_of(wb.train("longer.yaml"))
    for name, found in figures.items(): assert found == figures["unbroken"], f"{name} differs from the unbroken run"
    told("resumed")
    return figures


# -------------------------------------------------------------------------------------------------- models, samples
def samples() -> dict:
    figures: dict = {}
    labels = [3, 7, 1]
    for name in ("pretrain", "finetune", "dmp", "dmp-top-k", "dmp-condition", "prompt-tuning-prepend", "dtr", "r-tr",
                 "dmp-and-dtr", "dmp-on-dtr", "digits-dmp"):
        model = wb.load_model(name)
        for sampler in ("ddpm", "ddim", "dpmsolver++", "unipc", "heun"):
            for scale in (1.0, 2.0):
                images = wb.sample(model, class_labels=labels, guidance_scale=scale, sampler=sampler,
                                   num_inference_steps=5, seed=11, quiet=True)
                figures[f"{name}/{sampler}/g{scale:g}"] = digest(images)
    told("samples")
    drawn = lambda name, n, **settings: digest(wb.sample(wb.load_model(name), n, quiet=True, **settings))
    figures["flow/flow-euler"] = drawn("flow", 3, class_labels=labels, sampler="flow-euler", num_inference_steps=5,
                                       prediction_type="flow_prediction")
    figures["v-p2/ddim"] = drawn("v-p2", 3, prediction_type="v_prediction", num_inference_steps=5)
    figures["learn-sigma/ddpm"] = drawn("learn-sigma-min-snr", 3, sampler="ddpm", num_inference_steps=5,
                                        schedule="cosine", guidance_channels=1)
    figures["interval"] = drawn("pretrain", 4, num_inference_steps=6, batch_size=3, first=2, guidance_scale=3.0,
                                guidance_interval=(200, 700))
    figures["plain"] = digest(wb.sample(wb.load_model("dmp", patched=False), 4, num_inference_steps=4, quiet=True))
    figures["trajectory"] = [[s.step, float(s.timestep), digest(s.x_t), digest(s.pred_x0)]
                             for s in wb.sample_trajectory(wb.load_model("dmp"), 2, num_inference_steps=3)]
    return figures


@torch.no_grad()
def looks() -> dict:
    "Gates, masks, baked tables, forward passes of patched and routed models of other classes, losses, intervals."
    figures: dict = {}
    t = torch.tensor([0, 10, 250, 500, 750, 999])
    g = torch.Generator().manual_seed(1)
    x, labels = torch.randn(6, 1, 8, 8, generator=g), torch.tensor([0, 1, 2, 3, 9, 10])
    for name in ("dmp", "dmp-top-k", "dmp-condition", "dmp-and-dtr", "prompt-tuning", "digits-dmp"):
        model = wb.load_model(name)
        patch = wb.get_patch(model)
        condition = {"class_labels": labels} if name == "dmp-condition" else {}
        answer = lambda model=model: digest(model(x, timestep=t, class_labels=labels).sample)
        figures[name] = {"gates": plain(patch.gates(t, **condition)), "entropy": plain(patch.entropy(t, **condition)),
                         "answer": answer()}
        if not condition:
            with patch.baked(t): figures[name]["baked"] = answer()
        with wb.patch_disabled(model): figures[name]["disabled"] = answer()
        wb.save_patch(model, f"{name}-patch")
        figures[name]["saved"] = file_digest(Path(f"{name}-patch/adapter_model.safetensors"))
        wb.unpatch(model)
        wb.load_patch(model, f"{name}-patch")
        figures[name]["loaded"] = answer()
    for settings in ({}, {"sharing_ratio": 0.5, "alpha": 1.5}, {"kind": "random", "seed": 5, "sharing_ratio": 0.5},
                     {"num_train_timesteps": 50}):
        figures[f"mask {settings}"] = plain(wb.routing_mask(torch.arange(0, 50, 7), 64, **settings))
    figures["backbones"] = {name: other_backbone(make) for name, make in other_backbones().items()}
    noise, out = torch.randn(6, 1, 8, 8, generator=g), torch.randn(6, 2, 8, 8, generator=g)
    for weighting in ("constant", "min-snr", "p2"):
        for kind in ("epsilon", "sample", "v_prediction", "flow_prediction"):
            answer = out[:, :1] if kind == "flow_prediction" else out
            losses = wb.diffusion_losses(answer, x.clamp(-1, 1), noise, t, "linear", weighting, kind)
            figures[f"losses {weighting} {kind}"] = plain(losses)
    figures["posterior"] = plain(wb.posterior(out, x, t, "cosine", True))
    figures["clusters"] = plain(wb.timestep_clusters(torch.linspace(9, -4, 200) ** 3, 5))
    with torch.enable_grad():
        figures["affinity"] = plain(wb.task_affinity(wb.load_model("finetune"), x.clamp(-1, 1), labels.clamp(max=9),
                                                     [(0, 333), (334, 666), (667, 999)], quiet=True))
    told("looks")
    return figures


def other_backbones() -> dict:
    from diffusers import DiTTransformer2DModel, UNet2DModel
    dit = lambda: DiTTransformer2DModel(sample_size=8, in_channels=1, out_channels=1, num_layers=2,
                                        num_attention_heads=4, attention_head_dim=8, norm_num_groups=1,
                                        num_embeds_ada_norm=10)
    unet = lambda: UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 16),
                               down_block_types=("DownBlock2D", "AttnDownBlock2D"), layers_per_block=1,
                               up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=11, norm_num_groups=4)
    return {"DiTTransformer2DModel": dit, "UNet2DModel": unet}


def other_backbone(make) -> dict:
    torch.manual_seed(0)
    model, g = make().eval(), torch.Generator().manual_seed(2)
    for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g) * 0.05)
    x, t, y = torch.randn(3, 1, 8, 8, generator=g), torch.tensor([0, 400, 999]), torch.tensor([0, 5, 9])
    answer = lambda: digest(model(x, timestep=t, class_labels=y).sample)
    found = {"plain": answer()}
    wb.route(model, wb.DTRConfig(sharing_ratio=0.7))
    found["routed"] = answer()
    torch.manual_seed(1)
    wb.patch(model, wb.DMPConfig(init="random"))
    found["both"] = answer()
    wb.unroute(model)
    found["patched"] = answer()
    wb.unpatch(model)
    return {**found, "again": answer()}


def latents(runs: Path) -> dict:
    "Images in folders, encoded by a VAE while training and by the command beforehand."
    from diffusers import AutoencoderKL
    rng = np.random.default_rng(0)
    for i in range(12):
        Path(f"photos/{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (18, 16, 3), np.uint8)).save(f"photos/{i % 3}/{i}.png")
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
                        sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)
    vae.save_pretrained("vae")
    tree = merged(PRETRAIN, {"model": {"in_channels": 4, "num_classes": 3},
                             "data": {"name": "photos", "size": 16, "vae": "vae", "flip": True, "num_workers": 0},
                             "train": {"batch_size": 8, "steps": 4, "sample_every": 4}})
    figures = {"latents": figures_of(wb.train(write("latents", tree)))}
    command = [sys.executable, "-m", "dmp_wb", "latents", "photos", "cache", "--vae", "vae", "--size", "16"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    cached = merged(tree, {"data": {"name": "cache", "size": None, "vae": None}})
    figures["latents-cached"] = figures_of(wb.train(write("latents-cached", cached)))
    told("latents")
    return figures


def measured() -> dict:
    settings = {"num_images": 80, "sampler": "ddim", "num_inference_steps": 4, "quiet": True, "note": False}
    figures = {"run": plain(wb.evaluate_run("dmp", bootstrap=5, kid_subsets=5, **settings)),
               "routed": plain(wb.evaluate_run("dtr", metrics="fid,kid", kid_subsets=5, **settings)),
               "sweep": plain(wb.guidance_sweep("pretrain", [1.0, 2.0], metrics="fid", **settings))}
    command = [sys.executable, "-m", "dmp_wb", "evaluate", "finetune", "--num-images", "40", "--metrics", "fid,is",
               "--num-inference-steps", "3"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures["command"] = json.loads(said[said.index("{\n"):])
    folder = wb.sample_run("dmp-on-dtr", 6, "files", num_inference_steps=4, quiet=True)
    figures["files"] = {f.name: image_digest(f) for f in sorted(Path(folder).glob("*.png"))}
    found, faults = wb.list_runs(sort="name")
    figures["list"] = {r.name: [r.method, r.state, r.step, r.steps, r.loss] for r in found} | {"faults": faults}
    told("measured")
    return figures


# --------------------------------------------------------------------------------------------- recording, comparing
def told(what: str): print(f"{time.perf_counter() - START:6.1f} s  {what}", file=sys.stderr, flush=True)


def record(save_runs: Path | None, only: list[str], processes: bool) -> dict:
    work = Path(tempfile.mkdtemp(prefix="dmp-wb-reference-"))
    runs = work / "runs"
    package = str(Path(wb.__file__).resolve().parent.parent)
    os.environ |= {"DMP_WB_RUNS": str(runs), "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    before = Path.cwd()
    os.chdir(work)
    try:
        import diffusers
        figures: dict = {"versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
                         "runs": train_all(only)}
        if only: figures["runs"] |= train_two(only)
        else:
            figures["runs"] |= latents(runs)
            figures["resumed"] = resumed(runs)
            figures["samples"], figures["looks"] = samples(), looks()
            if processes: figures["runs"] |= train_two([])
            figures["measured"] = measured()
        return figures
    finally:
        os.chdir(before)
        if save_runs: shutil.copytree(runs, save_runs)
        shutil.rmtree(work, ignore_errors=True)


def differences(old, new, where: str = "") -> list[str]:
    "What differs, a line each. Of a checkpoint, only tensors that are gone: a later version may keep more in it."
    if where.endswith("checkpoint.tensors"):
        left = list(new or [])
        gone = [d for d in old if d not in left or left.remove(d)]
        return [f"{where}: {len(gone)} of {len(old)} tensors are not there any more"] if gone else []
    if isinstance(old, dict) and isinstance(new, dict):
        absent = object()
        lines = []
        for k in [*old, *(k for k in new if k not in old)]:
            here = f"{where}.{k}" if where else k
            if new.get(k, absent) is absent: lines.append(f"{here}: missing now")
            elif old.get(k, absent) is absent: lines.append(f"{here}: new")
            else: lines += differences(old[k], new[k], here)
        return lines
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, pair in pairs for line in differences(*pair, f"{where}[{i}]")]
    return [] if old == new or old != old and new != new else [f"{where}: {str(old)[:60]} → {str(new)[:60]}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="where the figures go")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print what differs from these figures")
    parser.add_argument("--save-runs", type=Path, metavar="FOLDER", help="keep the run folders in a new folder")
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN", help="only these runs, their bases named too")
    parser.add_argument("--one-process", action="store_true", help="leave the runs of two processes out")
    parser.add_argument("--batch-format", type=int, help="how noise is drawn, as train.batch_format")
    args = parser.parse_args()
    global BATCH_FORMAT
    BATCH_FORMAT = args.batch_format
    file, keep = args.file.resolve(), args.save_runs and args.save_runs.resolve()
    if keep and keep.exists(): parser.error(f"{args.save_runs} is there: expected a new folder")
    print(f"dmp_wb of {Path(wb.__file__).parent}", flush=True)
    old = json.loads(args.compare.read_text()) if args.compare else None
    figures = json.loads(json.dumps(record(keep, args.only, not args.one_process)))
    file.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{len(figures['runs'])} runs in {time.perf_counter() - START:.0f} s: {file}")
    if old is None: return 0
    old["versions"].pop("dmp_wb", None)   # may differ
    if args.only: old = {"versions": old["versions"], "runs": {k: v for k, v in old["runs"].items() if k in args.only}}
    if args.one_process: old["runs"] = {k: v for k, v in old["runs"].items() if k not in LAUNCHED}
    lines = differences(old, figures)
    print("\n".join(lines) or f"all equal to {args.compare}")
    return 1 if lines else 0


START = time.perf_counter()
if __name__ == "__main__": sys.exit(main())
