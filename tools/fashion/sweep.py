"""The comparisons of issue 16, one job after the other;
what has its file in results/ is not done again, so it may be killed and started at any time.

    python tools/fashion/sweep.py            # all jobs whose needs are met, then waits for the base;
    several processes may run beside each other
    python tools/fashion/sweep.py --list     # the jobs, in order, and how they stand
"""
import fcntl
import sys
import time
import traceback
from pathlib import Path

import torch
from lora import lora_at, train_lora
from tools import (
    at_step, by_timestep, fashion, features, figures, frechet_distance, known, note, real, sampled, test_loss,
)

import dmp_wb as wb
from dmp_wb.checkpoints import Run, load_model
from dmp_wb.config import load_experiment
from dmp_wb.core import seed_of

BASE, HERE = Path("runs/fashion-base"), Path(__file__).parent / "experiments"
SEARCH_SEED, SEEDS = 101, (1, 2, 3)
TUNE_STEPS, TUNE_KEEP = 1000, (250, 500, 1000)   # 64,000 images, one epoch, for every method
SCRATCH_STEPS, SCRATCH_KEEP = 2000, (500, 1000, 1500, 2000)
RATES = {"dmp": (1e-3, 3e-3, 1e-2), "finetune": (1e-5, 5e-5, 2e-4), "prompt-tuning": (1e-3, 3e-3, 1e-2),
         "lora": (3e-4, 1e-3, 3e-3)}
RANK = 10          # 30,720 parameters; DMP on this base has 31,458
ROUTES = {"plain": [], "dtr": ["routing.sharing_ratio=0.8", "routing.alpha=4.0"],
          "r-tr": ["routing.sharing_ratio=0.8", "routing.kind=random"]}
WEIGHTS = {"min-snr": ["objective.weighting=min-snr"],
           "ant-uw": ["multitask.method=uw", "multitask.clusters=log-snr", "multitask.k=8"]}
FIRST, FULL = 2500, 10_000   # samples of the comparisons, and of the base and the floor


class NotYet(Exception): "What the job needs is not there."


def need(name: str) -> dict:
    if (found := known(name)) is None: raise NotYet(name)
    return found


def base_experiment():
    if not (BASE / "summary.json").is_file(): raise NotYet("the base")
    return Run(BASE).experiment


def kept(folder: Path) -> Path: return Path("runs/features") / folder.name

def measure(model, exp, folder: Path, images: int) -> dict:
    return {f"guidance {g:g}": figures(sampled(model, exp, kept(folder), g, images)) for g in (1.0, 1.5)}


# --- jobs
def floor() -> dict:
    base_experiment()   # the images alone would do, but the processor is the base's until then
    images, g = fashion("train")[0], torch.Generator().manual_seed(0)
    rows = torch.randperm(len(images), generator=g)[:FULL]
    part = real("train")[rows]
    return {"train images to test split": frechet_distance(part, real("test")),
            "as many as at first": frechet_distance(part[:FIRST], real("test")),
            "mirrored train images to test split": frechet_distance(features(images[rows].flip(3)), real("test")),
            "images": FULL}


def base_losses(exp) -> dict:
    file = Path("runs/base-test-loss.pt")
    if not file.is_file():
        torch.save(test_loss(load_model(BASE), exp, 2), f"{file}.tmp{time.time_ns()}")
        next(Path("runs").glob("base-test-loss.pt.tmp*")).replace(file)
    return torch.load(file)


def base(images: int = FULL) -> dict:
    exp = base_experiment()
    return {"steps": exp.train.steps, "test_loss": by_timestep(base_losses(exp)),
            "samples": measure(load_model(BASE), exp, BASE, images)}


def tuned(method: str, rate: float, seed: int) -> tuple[Path, object]:
    "A trained run of a method on the base."
    base_experiment()
    folder = Path("runs") / f"{method}-{rate:g}-seed{seed}"
    overrides = [f"optim.lr={rate}", f"seed={seed}", f"train.steps={TUNE_STEPS}", "train.keep_every=250"]
    exp = load_experiment(str(HERE / f"fashion-{'prompt-tuning' if method == 'lora' else method}.yaml"), overrides)
    if method == "lora":
        if not (folder / f"step-{TUNE_STEPS}.pt").is_file(): train_lora(exp, RANK, folder, TUNE_KEEP)
    elif not (folder / "summary.json").is_file(): wb.train(str(HERE / f"fashion-{method}.yaml"), overrides, folder)
    return folder, exp


def tuned_model(method: str, folder: Path, step: int):
    return lora_at(BASE, RANK, folder, step) if method == "lora" else at_step(folder, step)


def search(method: str, rate: float) -> dict:
    "How a rate changes the loss on the test split, after how many steps."
    folder, exp = tuned(method, rate, SEARCH_SEED)
    reference = base_losses(exp)
    return {"method": method, "rate": rate, "seed": SEARCH_SEED, "test_loss": {
        step: by_timestep(test_loss(tuned_model(method, folder, step), exp, 2), reference) for step in TUNE_KEEP}}


def best_rate(method: str) -> float:
    "The rate with the lowest loss over the test images with even numbers after all steps."
    found = {rate: need(f"search-{method}-{rate:g}")["test_loss"][str(TUNE_STEPS)]["even"]["loss"]
             for rate in RATES[method]}
    return min(found, key=found.get)


def compare(method: str, seed: int, images: int = FIRST) -> dict:
    rate = best_rate(method)
    folder, exp = tuned(method, rate, seed)
    model = tuned_model(method, folder, TUNE_STEPS)
    return {"method": method, "rate": rate, "seed": seed, "steps": TUNE_STEPS,
            "test_loss": by_timestep(test_loss(model, exp, 2), base_losses(exp)),
            "samples": measure(model, exp, folder, images)}


def held(patch, how: str, seed: int):
    "Gates held at their mean over timesteps, or taken from another timestep."
    if how == "shuffled":
        order, inner = (torch.randperm(1000, generator=torch.Generator().manual_seed(seed_of(seed, "shuffled-gates"))),
                        patch._gate_input)
        patch._gate_input = lambda model, timestep, inputs: inner(
            model, order[timestep.round().long()].to(timestep.dtype), inputs)
    else:
        with torch.no_grad(): mean = patch.gates(list(range(1000))).mean(0, keepdim=True)
        patch._gates = lambda u, batch, noisy, like: ({mean.shape[-1]: mean.expand(batch, -1, -1)}, None)


def control(how: str, seed: int, images: int = FIRST) -> dict:
    "The trained DMP of a seed, with other gates."
    rate = best_rate("dmp")
    folder, exp = tuned("dmp", rate, seed)
    model = at_step(folder, TUNE_STEPS)
    held(wb.get_patch(model), how, seed)
    return {"method": f"dmp, gates {how}", "rate": rate, "seed": seed,
            "test_loss": by_timestep(test_loss(model, exp, 2), base_losses(exp)),
            "samples": measure(model, exp, folder.with_name(f"{folder.name}-{how}"), images)}


def scratch(route: str, seed: int, weights: str | None = None) -> dict:
    "From scratch, with distances against steps."
    base_experiment()
    folder = Path("runs") / f"scratch-{route}{'' if weights is None else '-' + weights}-seed{seed}"
    if not (folder / "summary.json").is_file():
        wb.train(str(HERE / "fashion-scratch.yaml"), [f"seed={seed}", f"train.steps={SCRATCH_STEPS}", *ROUTES[route],
                                                      *(WEIGHTS[weights] if weights else [])], folder)
    exp, rows = Run(folder).experiment, {}
    for step in SCRATCH_KEEP:
        model = at_step(folder, step)
        rows[step] = {"test_loss": by_timestep(test_loss(model, exp))["all"]}
        # with guidance, which doubles the work, at the last step alone
        for g in (1.0, 1.5)[:1 + (step == SCRATCH_STEPS)]:
            rows[step][f"guidance {g:g}"] = figures(sampled(model, exp, kept(folder) / f"step-{step}", g, FIRST),
                                                    rows=step == SCRATCH_STEPS)
    return {"route": route, "weights": weights or "constant", "seed": seed, "steps": rows}


JOBS = {"floor": floor, "base": base}
for m, rs in RATES.items(): JOBS |= {f"search-{m}-{r:g}": (lambda m=m, r=r: search(m, r)) for r in rs}
for s in SEEDS:
    JOBS |= {f"compare-{m}-seed{s}": (lambda m=m, s=s: compare(m, s))
             for m in ("dmp", "finetune", "prompt-tuning", "lora")}
    JOBS |= {f"control-{how}-seed{s}": (lambda how=how, s=s: control(how, s)) for how in ("mean", "shuffled")}
for s in SEEDS: JOBS |= {f"scratch-{r}-seed{s}": (lambda r=r, s=s: scratch(r, s)) for r in ROUTES}
JOBS |= {f"scratch-{r}-{w}-seed1": (lambda r=r, w=w: scratch(r, 1, w)) for w in WEIGHTS for r in ("plain", "dtr")}


def attempt(name: str) -> str:
    "done, busy (another process has it), waiting (its needs are not met) or failed."
    if known(name) is not None: return "done"
    Path("runs/.jobs").mkdir(parents=True, exist_ok=True)
    with open(f"runs/.jobs/{name}", "w") as lock:
        try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError: return "busy"
        started, cpu = time.time(), time.process_time()
        try: found = JOBS[name]()
        except NotYet as e: return f"waits for {e}"
        except Exception:
            traceback.print_exc()
            return "failed"
        note(name, found | {"seconds": round(time.time() - started), "cpu_seconds": round(time.process_time() - cpu)})
        print(f"{time.strftime('%F %T')} {name}: {time.time() - started:.0f} s", flush=True)
        return "done"


if __name__ == "__main__":
    if "--list" in sys.argv:
        for name in JOBS: print(f"{'done' if known(name) else '-':5} {name}")
        sys.exit()
    failed: dict[str, int] = {}
    while True:
        states = {}
        for name in JOBS:
            if failed.get(name, 0) >= 2: states[name] = "failed"; continue
            states[name] = attempt(name)
            if states[name] == "failed": failed[name] = failed.get(name, 0) + 1
        if all(s in ("done", "failed") for s in states.values()): break
        time.sleep(60)
    print({n: s for n, s in states.items() if s != "done"} or "all done")
