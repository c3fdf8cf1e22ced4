"""Kill a sweep at random moments, start it again each time,
and compare its runs with those of a sweep that nobody touched.

`python tools/drills/kill_a_sweep.py [--kills 10] [--jobs 2]`: four short trainings by `dmp-wb run pretrain`.
SIGKILL hits the sweep alone, so that its
children have to find out, or every process of it at once, as when a machine goes down.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from dmp_wb.batch.state import FINISHED, read_state

GRID = ["-p", "optim.lr", "1e-3", "2e-3", "-p", "seed", "0", "1"]
SMALL = {"num_samples": 10, "num_inference_steps": 4, "model.hidden_size": 16, "model.num_layers": 2,
         "model.num_attention_heads": 2, "train.batch_size": 16,
         "train.steps": 600, "train.checkpoint_every": 20, "train.log_every": 20, "train.cpu": "true",
         "train.log_with": "null"}
TRAINING = ["pretrain", *GRID, *(w for k, v in SMALL.items() for w in ("-p", k, str(v)))]
TIMES = ("images_per_second", "memory_gib", "versions")   # what may differ between two runs that do the same


def start(words, folder, jobs):
    return subprocess.Popen([sys.executable, "-m", "dmp_wb", "run", *words, "--folder", str(folder), "--jobs",
                             str(jobs)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def left_behind(folder):
    "Processes that still work in a folder."
    found = []
    for p in psutil.process_iter(["cmdline", "status"]):
        if str(folder) in " ".join(p.info["cmdline"] or []) and p.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(p)
    return found


def figures(run):
    "What a run found out, without its timings."
    strip = lambda row: {k: v for k, v in row.items() if k not in TIMES}
    rows = [strip(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = {str(f.relative_to(run)): f.read_bytes() for f in sorted(run.glob("model/*.safetensors"))}
    return strip(json.loads((run / "summary.json").read_text())), rows, weights


def runs_of(folder): return {f.parent.name: f.parent for f in sorted(folder.glob("*/run.json"))}


def drill(words, kills, folder, jobs=2, seed=0):
    "Returns how many runs were finished at each kill, and what is wrong in the end."
    draw, folder = random.Random(seed), Path(folder)
    begun = time.monotonic()
    whole = start(words, folder / "whole", jobs)
    error = whole.communicate()[1]
    assert whole.returncode == 0, error
    life, seen, hits, wrong = time.monotonic() - begun, {}, [], []
    broken = folder / "broken"

    def look():   # a run that is finished must never be executed again
        for name, run in runs_of(broken).items():
            state = read_state(run)
            mark = (state.started, state.attempts,
                    (run / "run.ipynb").stat().st_mtime_ns) if state.status == FINISHED else None
            if name in seen and mark != seen[name]: wrong.append(f"{name} was finished, and executed again")
            if mark: seen[name] = mark

    for kill in range(kills):
        process = start(words, broken, jobs)
        time.sleep(draw.uniform(0, 0.6 * life))
        everyone = [psutil.Process(process.pid),
                    *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        over = process.poll() is not None
        for p in everyone if kill % 2 else everyone[:1]:
            try: p.kill()
            except psutil.NoSuchProcess: pass
        process.wait()
        process.stderr.close()   # orphans hold the other end
        look()
        hits.append(f"{len(seen)}{' (over)' if over else ''}")
    last = start(words, broken, jobs)
    error = last.communicate()[1]
    if last.returncode: wrong.append(f"the last sweep ended with status {last.returncode}: {error[-1000:]}")
    look()
    if runs_of(broken).keys() != runs_of(folder / "whole").keys(): wrong.append("there are not the same runs")
    for name, run in runs_of(folder / "whole").items():
        if name not in seen: wrong.append(f"{name} is not finished")
        elif figures(run) != figures(broken / name):
            wrong.append(f"{name} has other figures than in the unbroken sweep")
    end = time.monotonic() + 5
    while left_behind(folder) and time.monotonic() < end: time.sleep(0.1)
    wrong += [f"process {p.pid} was left behind" for p in left_behind(folder)]
    return hits, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as d:
        begun = time.monotonic()
        hits, wrong = drill(TRAINING, a.kills, d, a.jobs, a.seed)
    found = ("WRONG: " + "; ".join(wrong) if wrong
             else "every run finished exactly once, summaries, metrics and weights equal")
    print(f"killed {len(hits)} times; runs finished at each: {' '.join(hits)}; {found} "
          f"({time.monotonic() - begun:.0f} s)")
    return len(wrong)


if __name__ == "__main__": sys.exit(main())
