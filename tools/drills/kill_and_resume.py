"""Kill a run at random moments, resume it each time, and compare it with one that nobody touched.

`python tools/drills/kill_and_resume.py [--kills 20]`: pre-training and DMP, in one process and in two.
Children are forked from a parent that has
imported everything, so that a life lasts about a second and most of it is training, saving and loading.
"""
import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import sklearn.datasets  # noqa: F401
import torch

import dmp_wb as wb
import dmp_wb.training.state  # noqa: F401
from dmp_wb.store.checkpoints import list_checkpoints, load_checkpoint, newest_checkpoint
from dmp_wb.store.run import Run

SETTINGS = ["train.batch_size=16", "train.steps=600", "train.checkpoint_every=3", "train.log_every=3",
            "train.keep_last=3", "train.ema_decay=0.9"]
EXPERIMENTS = {"pre-training": ("digits-quick", ["model.hidden_size=32", "model.num_layers=2",
                                                 "model.num_attention_heads=2"]), "DMP": ("digits-dmp", [])}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(name, folder, processes):
    "Fork the processes of a run; returns their ids."
    experiment, extra = EXPERIMENTS[name]
    port, children = free_port(), []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for stream in (1, 2): os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
                if processes > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
                warnings.simplefilter("ignore")
                torch.set_num_threads(1)
                wb.train(experiment, [*SETTINGS, *extra, "train.cpu=true"], folder)
                status = 0
            except BaseException: Path(f"{folder}.error-{rank}").write_text(traceback.format_exc())
            finally: os._exit(status)
        children.append(pid)
    return children


def wait(children):
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    return all(s == 0 for s in statuses)


def drill(name, processes, kills, folder, seed=0):
    """Kill a run `kills` times and let it finish;
    returns the kills that hit, and whether its weights equal those of an unbroken run and nothing is left over."""
    draw, folder = random.Random(seed), Path(folder)
    begun, hits, starts = time.perf_counter(), 0, []
    assert wait(start(name, folder / "whole", processes)), (folder / "whole.error-0").read_text()
    life = time.perf_counter() - begun
    steps = lambda: [p.name for p in list_checkpoints(folder / "broken")][-1:]
    while hits < kills and not Run(folder / "broken").finished:
        before, children = steps(), start(name, folder / "broken", processes)
        if hits % 4 == 3: time.sleep(draw.uniform(0, 0.15 * life))   # anywhere, imports and loading too
        else:   # in the steps and saves after a new checkpoint
            while steps() == before and not Run(folder / "broken").finished: time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.12))
        # all at once, or the first and the rest find out
        for pid in children if draw.random() < 0.5 else children[:1]: os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        for pid in children[1:]:
            if os.waitpid(pid, os.WNOHANG) == (0, 0): os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        os.waitpid(children[0], 0)
        hits += 1
        newest = newest_checkpoint(folder / "broken")
        starts.append(load_checkpoint(newest)["step"] if newest else 0)
    assert wait(start(name, folder / "broken", processes)), [p.read_text() for p in folder.glob("broken.error-*")]
    whole, broken = (load_checkpoint(newest_checkpoint(folder / n)) for n in ("whole", "broken"))
    same = whole["model"].keys() == broken["model"].keys() and all(torch.equal(w, broken["model"][k])
                                                                   for k, w in whole["model"].items())
    same = same and all(torch.equal(a, b)
                        for a, b in zip(whole["ema"]["shadow_params"], broken["ema"]["shadow_params"], strict=True))
    lines = Run(folder / "broken").metrics()["step"] == Run(folder / "whole").metrics()["step"]
    left = [str(p.relative_to(folder)) for p in (folder / "broken").rglob(".*") if p.suffix in (".tmp", ".old")]
    if left: print(f"left over: {', '.join(left)}", flush=True)
    return hits, starts, same and lines and not left


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    a = parser.parse_args()
    warnings.simplefilter("ignore")
    different = 0
    for name in EXPERIMENTS:
        for processes in (1, 2):
            with tempfile.TemporaryDirectory() as d:
                begun = time.perf_counter()
                hits, starts, same = drill(name, processes, a.kills, d)
                print(f"{name:13} {processes} process{'es' if processes > 1 else '  '}  killed {hits} times; newest "
                      f"checkpoint after each: {' '.join(map(str, starts))}; "
                      f"{'weights, averages and metrics bit-identical' if same else 'DIFFERENT'} "
                      f"({time.perf_counter() - begun:.0f} s)", flush=True)
                different += not same
    return different


if __name__ == "__main__": sys.exit(main())
