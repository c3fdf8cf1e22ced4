"""Train for many steps and move every explorer's slider many times, and see how the memory of the process grows.

`python tools/drills/memory.py [--steps 20000] [--moves 500]`.
What grows after the first tenth of the steps, or the first fifth of the moves,
when caches and allocators are warm, is a leak: more than 32 MiB is an error.
"""
import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("MPLBACKEND", "agg")

import psutil
from PIL import Image

import dmp_wb as wb
from dmp_wb.look import explore as look_explore

MOST = 32.0   # MiB that may come and go
SMALL = ["model.hidden_size=16", "model.num_layers=1", "model.num_attention_heads=2", "train.batch_size=4",
         "train.cpu=true", "train.log_every=100", "train.checkpoint_every=1000"]


def mib() -> float: return psutil.Process().memory_info().rss / 2**20


def training(folder: Path, steps: int) -> list[float]: # MiB at each line of the log
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        run = wb.train("digits-quick", [*SMALL, f"train.steps={steps}"], folder / "run")
    return [1024 * v for v in run.metrics()["memory_gib"]]


def explorers(folder: Path):
    "Each explorer, and what the n-th move of its slider is."
    for name in ("a", "b"):
        (folder / name / "samples").mkdir(parents=True)
        (folder / name / "config.yaml").write_text("name: x\n")
        (folder / name / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "mse": 2.0}\n')
        Image.new("L", (64, 64), 100).save(folder / name / "samples" / "step-0000003.png")
    gate, route, walk, runs = (look_explore.GateExplorer("digits-dmp"), look_explore.RoutingExplorer(),
                               look_explore.DenoiseExplorer("digits-dmp"),
                               look_explore.RunExplorer([folder / "a", folder / "b"]))
    yield "gates", lambda n: setattr(gate.timestep, "value", 37 * n % 1000)
    yield "routing", lambda n: setattr(route.alpha, "value", 2 ** (n % 40 / 10 - 1))
    yield "denoising", lambda n: setattr(walk.step, "value", n % (walk.step.max + 1))
    yield "runs", lambda n: setattr(runs.column, "value", ("mse", "loss")[n % 2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--moves", type=int, default=500)
    a = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ["DMP_WB_EXPLORE"] = "live"   # they draw at each move, as in JupyterLab
    faults = 0

    def tell(name: str, what: str, first: float, last: float, begun: float):
        nonlocal faults
        faults += last - first > MOST
        print(f"{name:10} {what}: {first:.0f} MiB, then {last:.0f} MiB{'' if last - first <= MOST else ': IT GROWS'} "
              f"({time.monotonic() - begun:.0f} s)", flush=True)
    with tempfile.TemporaryDirectory() as d:
        for name, move in explorers(Path(d)):
            begun = time.monotonic()
            for n in range(a.moves // 5): move(n + 1)
            first = mib()
            for n in range(a.moves // 5, a.moves): move(n + 1)
            tell(name, f"{a.moves} moves", first, mib(), begun)
        begun = time.monotonic()
        log = training(Path(d), a.steps)
        tell("training", f"{a.steps:,} steps", log[len(log) // 10], log[-1], begun)
    return faults


if __name__ == "__main__": sys.exit(main())
