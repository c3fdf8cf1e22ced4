"""What a patch and a route cost: `python tools/benchmarks/overhead.py [--model DiT-B/2] [--batch 8] [--rounds 15]`.

Times are taken in turn, one round after another in one process;
the ratio is the median of the rounds' ratios, with their quartiles beside it: the machines are
noisy, and what slows one slows its neighbours.
Peak memory is that of the process (on a GPU, of the allocator), each in a process of its own.
"""
import argparse
import gc
import statistics
import subprocess
import sys
import threading
import time

import psutil
import torch

import dmp_wb as wb
from dmp_wb.models.dit import DiT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = {"patched forward": 1.05, "routed forward": 1.03, "DMP step": 0.75, "DMP step, peak memory": 0.6}


def build(name, kind):
    torch.manual_seed(0)
    model = DiT.from_name(name, sample_size=32).to(DEVICE)
    if kind in ("patched forward", "DMP step"):
        p = wb.patch(model)
        with torch.no_grad():
            for w in p.parameters(): w.normal_(std=0.02)
    if kind == "routed forward": wb.route(model)
    return model.train() if kind.endswith("step") else model.eval()


def stepper(name, batch, kind):
    "A function that does the thing once."
    model = build(name, kind)
    x, t, y = (torch.randn(batch, 4, 32, 32, device=DEVICE), torch.randint(1000, (batch,), device=DEVICE),
               torch.randint(1000, (batch,), device=DEVICE))
    if not kind.endswith("step"):
        @torch.no_grad()
        def once(): model(x, t, y)
        return once
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def once():
        loss = model(x, t, y).sample.square().mean()
        if kind == "DMP step": loss = loss + wb.get_patch(model).balance_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return once


def synchronize():
    if DEVICE == "cuda": torch.cuda.synchronize()


def seconds(once):
    synchronize()
    start = time.perf_counter()
    once()
    synchronize()
    return time.perf_counter() - start


def in_turn(name, batch, kinds, rounds):
    "Seconds of each kind in every round, one after the other."
    steps = {k: stepper(name, batch, k) for k in kinds}
    for once in steps.values(): once()   # warm up
    taken = {k: [] for k in kinds}
    for r in range(rounds):
        order = [*kinds[r % len(kinds):], *kinds[:r % len(kinds)]]   # nobody is always first
        for k in order: taken[k].append(seconds(steps[k]))
    del steps
    gc.collect()
    return taken


def peak(name, batch, kind):
    "Bytes that the process needed beyond what it had before the model was made."
    if DEVICE == "cuda":
        once = stepper(name, batch, kind)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3): once()
        return torch.cuda.max_memory_allocated()
    before, highest, done = psutil.Process().memory_info().rss, 0, threading.Event()

    def watch():   # the high-water mark of the process would also count what importing took
        nonlocal highest
        while not done.wait(0.002): highest = max(highest, psutil.Process().memory_info().rss)
    watcher = threading.Thread(target=watch)
    watcher.start()
    once = stepper(name, batch, kind)
    for _ in range(3): once()
    done.set()
    watcher.join()
    return highest - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-B/2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.peak: return print(peak(a.model, a.batch, a.peak))
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{a.model}, batch {a.batch}, float32, {device}, torch {torch.__version__}, medians of {a.rounds} rounds in "
          "turn")
    rows = []
    for base, kinds in {"plain forward": ["patched forward", "routed forward"],
                        "full fine-tuning step": ["DMP step"]}.items():
        taken = in_turn(a.model, a.batch, [base, *kinds], a.rounds)
        rows.append((base, statistics.median(taken[base]), "s", None, ""))
        for k in kinds:
            # what slowed a round slowed both
            low, middle, high = statistics.quantiles([x / y for x, y in zip(taken[k], taken[base])], n=4)
            rows.append((k, statistics.median(taken[k]), "s", middle, f"rounds: {low:.3f} to {high:.3f}"))
    memory = {}
    for kind in ("full fine-tuning step", "DMP step"):
        out = subprocess.run([sys.executable, __file__, "--model", a.model, "--batch", str(a.batch), "--peak", kind],
                             capture_output=True, text=True, check=True)
        memory[kind] = int(out.stdout.split()[-1]) / 2**30
    rows.append(("full fine-tuning step, peak memory", memory["full fine-tuning step"], "GiB", None, ""))
    rows.append(("DMP step, peak memory", memory["DMP step"], "GiB",
                 memory["DMP step"] / memory["full fine-tuning step"], ""))
    print(f"{'':36}{'measured':>14}{'ratio':>9}{'target':>9}")
    for name, value, unit, ratio, note in rows:
        print(f"{name:36}{value:10.3f} {unit:3}"
              + ("" if ratio is None else f"{ratio:9.3f}{'≤ ' + format(TARGETS[name], '.2f'):>9}  "
                 f"{'met' if ratio <= TARGETS[name] else 'MISSED':8}{note}".rstrip()))


if __name__ == "__main__": main()
