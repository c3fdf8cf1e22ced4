"""What the sweep has measured so far, as one small file that the page of results reads. Run it again when jobs end.

    cd FOLDER-OF-THE-SWEEP; python …/tools/fashion/collect.py    # writes nbs/experiments/fashion/comparisons.json

The folder holds results/, runs/ and data/. Differences to the base are taken here, from the kept features: row i of
every model comes from the same noise, and the intervals are over the images, resampled class by class.
"""
import functools
import math
import sys
from pathlib import Path

import sweep
import torch
from safetensors.torch import load_file
from sweep import BASE, FIRST, JOBS, RANK, RATES, SCRATCH_KEEP, SEEDS, TUNE_STEPS, kept
from tools import SAMPLING_SEED, STEPS, figures, known, real

import dmp_wb as wb
from dmp_wb.core.files import write_json
from dmp_wb.evaluation.distances import frechet_bootstrap

TARGET = Path(__file__).parents[2] / "nbs" / "experiments" / "fashion" / "comparisons.json"
GUIDANCE, ROUNDS = (1.0, 1.5), 200


def rounded(value, digits: int = 5): # as value
    "Numbers with so many significant digits, in lists and dictionaries too."
    if isinstance(value, dict): return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list): return [rounded(v, digits) for v in value]
    if not isinstance(value, float) or value == 0 or not math.isfinite(value): return value
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))


@functools.cache
def samples(folder: Path, guidance: float) -> dict: # of the first samples: features [N, 96], right [N]
    parts = [load_file(kept(folder) / f"g{guidance:g}-{first:05d}.safetensors") for first in range(0, FIRST, 500)]
    return {key: torch.cat([p[key] for p in parts]) for key in parts[0]}


def run_folder(found: dict) -> Path:
    "Where the features of a comparison lie, from its row."
    method, _, how = found["method"].partition(", gates ")
    folder = Path(f"{method}-{found['rate']:g}-seed{found['seed']}")
    return folder.with_name(f"{folder.name}-{how}") if how else folder


def comparison(found: dict) -> dict:
    "A trained run beside the base: its figures, and the paired differences of distance and of loss."
    row = {key: found[key] for key in ("method", "rate", "seed", "seconds", "cpu_seconds")}
    for g in GUIDANCE:
        both = {"base": samples(BASE, g)["features"], "run": samples(run_folder(found), g)["features"]}
        paired = frechet_bootstrap(both, real("test"), against="base", strata=torch.arange(FIRST) % 10, rounds=ROUNDS)
        told, again = found["samples"][f"guidance {g:g}"], paired["run"]
        assert told["images"] == FIRST and abs(told["fid_test"] - again["frechet"]) < 1e-3, (found["method"], told)
        row[f"guidance {g:g}"] = {k: v for k, v in told.items() if k != "images"} | {
            "difference": again["difference"], "difference_interval": again["difference_interval"]}
    # rates were chosen on images with even numbers
    return row | {"test_loss": {k: v for k, v in found["test_loss"]["odd"].items() if k != "loss_by_bin"}}


def searched(method: str) -> list[dict]:
    rows = []
    for rate in RATES[method]:
        if (found := known(f"search-{method}-{rate:g}")) is None: continue
        for step, loss in found["test_loss"].items():
            rows.append({"rate": rate, "step": int(step)} | {half: {k: loss[half][k] for k in (
                "difference", "standard_error")} for half in ("even", "odd")})
    return rows


def gates(folder: Path) -> dict:
    """How much gates differ between timesteps: the share of a gate's weight that lies elsewhere than in the mean gate,
    averaged over timesteps and blocks, and at most."""
    with torch.no_grad(): found = wb.get_patch(wb.load_model(folder)).gates(list(range(1000)))
    moved = (found - found.mean(0)).abs().sum(-1) / 2
    return {"prompts": found.shape[-1], "smallest": float(found.min()), "largest": float(found.max()),
            "moved": float(moved.mean()), "moved_at_most": float(moved.max())}


def collected() -> dict:
    done = {name: found for name in JOBS if (found := known(name)) is not None}
    of = lambda *kinds: {n: f for n, f in done.items() if n.startswith(kinds)}
    trained = [found for name, found in of("compare-dmp").items()]
    return {
        "run_at_commit": "e5dfa6a", "jobs": len(JOBS), "jobs_done": len(done), "missing": sorted(JOBS.keys() - done),
        "settings": {
            "base": "fashion-base", "samples": FIRST, "sampler": "dpmsolver++", "num_inference_steps": STEPS,
            "sampling_seed": SAMPLING_SEED, "seeds": list(SEEDS), "search_seed": sweep.SEARCH_SEED,
            "steps": TUNE_STEPS, "batch_size": 64, "scratch_steps": list(SCRATCH_KEEP), "lora_rank": RANK,
            "rates": {m: list(r) for m, r in RATES.items()}, "routes": sweep.ROUTES, "weights": sweep.WEIGHTS,
            "experiments": "tools/fashion/experiments", "bootstrap_rounds": ROUNDS},
        "base": {f"guidance {g:g}": figures(samples(BASE, g)) for g in GUIDANCE}
                | {"test_loss": {k: done["base"]["test_loss"]["odd"][k] for k in ("loss", "loss_by_bin")}},
        "searches": {method: searched(method) for method in RATES},
        "comparisons": [comparison(found) for found in of("compare", "control").values()],
        "gates": [{"seed": f["seed"]} | gates(Path("runs") / run_folder(f)) for f in trained],
        "scratch": [{k: v for k, v in found.items()} for found in of("scratch").values()]}


if __name__ == "__main__":
    if not Path("results").is_dir(): sys.exit("error: no folder results here: run it in the folder of the sweep")
    found = rounded(collected())
    write_json(TARGET, found)
    print(f"{TARGET}: {found['jobs_done']} of {found['jobs']} jobs, {TARGET.stat().st_size:,} bytes")
