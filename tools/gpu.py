"""Is everything right on this GPU, and how fast? `make gpu`, or `python tools/gpu.py [--budget 480]`.

Checks of correctness first (losses, gates, masks, resuming, precisions, offloading, … against the CPU), then the speed
of training and sampling at real sizes against a plain reference loop (`tools/benchmarks/reference.py`), with random
weights and random latents: nothing is downloaded. It keeps to its budget: the most important parts come first, and
what does not fit any more is skipped with a line. Writes gpu-DEVICE.json and gpu-DEVICE.md to nbs/experiments, where
the page `results` finds them. The status is 1 where a check of correctness failed.

Without a CUDA device it says so and ends. `--device cpu --tiny` and `--device emu --tiny` try the tool itself: on the
CPU, and on the second device of the tests.

All parts run in one process, which this one watches: where a part takes the process with it, or hangs, a new one goes
on with the next part.
"""
import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]
STUCK = 150   # seconds after which a check is taken for stuck


class Here:
    "What a part asks of its surroundings: the device, a folder, the time that is left, and where its rows go."
    def __init__(self, device, folder: Path, args):
        self.measured, self.folder, self.tiny, self.compile, self.deadline = (device, folder, args.tiny, args.compile,
                                                                              args.deadline)
        self.events = folder / "events.jsonl"

    def __getattr__(self, name):   # of the device
        if name == "measured": raise AttributeError(name)
        return getattr(self.measured, name)

    def left(self) -> float: return self.deadline - time.time()

    def say(self, event: str, **facts):
        with self.events.open("a", encoding="utf-8") as f: f.write(json.dumps({"event": event, **facts}) + "\n")

    def row(self, row: dict): self.say("row", row=row)
    def skipped(self, name: str, why: str): self.say("variant", name=name, status="skipped", why=why)
    def failed(self, name: str, e: BaseException): self.say("variant", name=name, **failure(e))


def failure(e: BaseException) -> dict:
    "What went wrong, with the last lines of the traceback."
    return {"status": "failed", "why": f"{type(e).__name__}: {' '.join(str(e).split())[:400]}",
            "traceback": "".join(traceback.format_exception(e)).splitlines()[-8:]}


def work(args):
    "The process that does the parts, beginning with number `args.first`."
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch
    folder = Path(args.worker)
    here = Here(None, folder, args)
    if args.device == "cuda" and not torch.cuda.is_available(): return here.say("none")
    import dmp_wb
    from on_gpu.checks import CHECKS, exact
    from on_gpu.device import Device, Skip
    from on_gpu.speed import SPEEDS
    here.measured = Device(args.device)
    todo = [("check", name, exact(check), need) for name, (check, need) in CHECKS.items()] + [
        ("speed", name, part, need) for name, (part, need) in SPEEDS.items()]
    todo = [(kind, name, run, 1 if args.tiny else need) for kind, name, run, need in todo if name not in args.without]
    here.say("device", device=here.facts(), versions={"torch": torch.__version__, "dmp_wb": dmp_wb.__version__,
             "python": sys.version.split()[0]}, names=[(n, kind, name) for n, (kind, name, *_) in enumerate(todo)])
    for number, (kind, name, run, need) in list(enumerate(todo))[args.first:]:
        if here.left() < need:
            here.say("part", number=number, kind=kind, name=name, status="skipped", seconds=0,
                     why=f"{max(here.left(), 0):.0f} s of the budget are left, and it takes {need}")
            continue
        here.say("begin", number=number, kind=kind, name=name)
        begun, outcome = time.time(), {"status": "ok"}
        try: outcome["facts"] = run(here)
        except Skip as e: outcome = {"status": "skipped", "why": str(e)}
        except Exception as e: outcome = failure(e)
        here.say("part", number=number, kind=kind, name=name, seconds=time.time() - begun, **outcome)
        if outcome["status"] == "failed" and not here.usable(): sys.exit("the device does not compute any more")
        here.clear()
    here.say("end")


class Watch:
    "The process that starts the worker, reads what it says, and ends it at the deadline."
    def __init__(self, args, folder: Path):
        self.args, self.folder, self.read, self.running = args, folder, 0, None
        self.device, self.versions, self.names, self.none, self.ended = None, {}, [], False, False
        self.rows, self.found, self.next = [], {"check": [], "speed": []}, 0

    def start(self) -> subprocess.Popen:
        given = [sys.executable, __file__, "--worker", str(self.folder), "--device", self.args.device, "--first",
                 str(self.next), "--deadline", str(self.args.deadline), "--without", *self.args.without]
        given += ["--tiny"] * self.args.tiny + ["--compile"] * self.args.compile
        env = {**os.environ, "DMP_WB_RUNS": str(self.folder / "runs"), "MPLBACKEND": "agg"}
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(given, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                                    start_new_session=True)

    def take(self):
        "Read what the worker has said since."
        file = self.folder / "events.jsonl"
        if not file.exists(): return
        with file.open("rb") as f:
            f.seek(self.read)
            text = f.read()
        whole = text[:text.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.splitlines(): self.note(json.loads(line))

    def note(self, e: dict):
        kind = e.pop("event")
        if kind == "none": self.none = True
        elif kind == "end": self.ended = True
        elif kind == "device": self.device, self.versions, self.names = e["device"], e["versions"], e["names"]
        elif kind == "row":
            self.rows.append(r := e["row"])
            print(f"         {r['model']}, {r['what']}: {r['images_per_second']:.1f} images/s", flush=True)
        elif kind == "variant": self.outcome("speed", e)
        elif kind == "begin": self.running = {**e, "begun": time.time()}
        else:
            self.running, self.next = None, e["number"] + 1
            self.outcome(e.pop("kind"), e)

    def outcome(self, kind: str, e: dict):
        self.found[kind].append(e)
        number = lambda v: f"{v:.2g}" if isinstance(v, float) else v
        said = e.get("why") or ", ".join(f"{k} {number(v)}" for k, v in (e.get("facts") or {}).items())
        took = f" ({e['seconds']:.0f} s)" if e.get("seconds") else ""
        print(f"{e['status']:8} {e['name']}{': ' if said else ''}{said}{took}", flush=True)

    def lost(self, why: str):
        "The part that runs came to no end of its own."
        if self.running is None: return
        e, self.running = self.running, None
        self.next = e["number"] + 1
        self.outcome(e["kind"], {"number": e["number"], "name": e["name"], "status": "failed" if e["kind"] == "check"
                                 else "cut off", "why": why, "seconds": time.time() - e["begun"],
                                 "traceback": self.log()[-8:]})

    def log(self) -> list[str]: return (self.folder / "log").read_text(errors="replace").splitlines()

    def run(self):
        while not self.ended and not self.none:
            child = self.start()
            began_at = self.next
            try: self.follow(child)
            finally: end_family(child)
            self.take()
            if self.ended or self.none: return
            if time.time() >= self.args.deadline: return self.out_of_time()
            if self.device is None or self.running is None and self.next == began_at:
                raise SystemExit("\n".join(["the measuring process does not start:", *self.log()[-8:]]))
            self.lost(f"it ended the process, with status {child.returncode}")

    def follow(self, child: subprocess.Popen):
        while child.poll() is None and not self.ended and time.time() < self.args.deadline:
            time.sleep(0.1)
            self.take()
            if self.running and self.running["kind"] == "check" and time.time() - self.running["begun"] > STUCK:
                end_family(child)
                self.take()
                return self.lost(f"it was stuck for {STUCK} s")

    def out_of_time(self):
        running = self.running
        self.lost("the budget is spent")
        if running and running["kind"] == "check": self.found["check"][-1]["status"] = "skipped"
        for number, kind, name in self.names[self.next:]:
            self.outcome(kind, {"number": number, "name": name, "status": "skipped", "why": "the budget is spent"})


def end_family(child: subprocess.Popen):
    "SIGKILL to a process of ours and all that it started."
    import psutil
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(child.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess): process.kill()
    child.kill()
    child.wait()


def report_of(watch: Watch, args, begun: float) -> dict:
    from on_gpu.report import against
    return {"device": watch.device, "versions": watch.versions, "date": time.strftime("%Y-%m-%d"),
            "budget": args.budget, "tiny": args.tiny, "seconds": time.time() - begun, "checks": watch.found["check"],
            "speeds": watch.found["speed"], "rows": against(watch.rows)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=480, help="seconds in all")
    parser.add_argument("--device", choices=["cuda", "cpu", "emu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and few steps, to try the tool")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="also compiled (default: on CUDA)")
    parser.add_argument("--without", nargs="*", default=[], help="parts that are left out, by name")
    parser.add_argument("--out", type=Path, help="the folder of the report (default: nbs/experiments; tiny: runs/gpu)")
    for name in ("worker", "die"): parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile is None: args.compile = args.device == "cuda"
    if args.out is None: args.out = ROOT / ("runs/gpu" if args.tiny else "nbs/experiments")
    return args


def main() -> int:
    args, begun = arguments(), time.time()
    if args.worker: return work(args) or 0
    if args.die:
        from on_gpu.checks import killed_here
        return killed_here(args.device, args.die, at=8) or 0
    args.deadline = begun + args.budget - 3   # the last seconds are for the report
    with tempfile.TemporaryDirectory(prefix="dmp-wb-gpu-") as folder:
        watch = Watch(args, Path(folder))
        watch.run()
    if watch.none:
        print("no CUDA device on this machine: nothing was checked and nothing measured")
        return 0
    from on_gpu.report import write
    report = report_of(watch, args, begun)
    files = write(report, args.out)
    failed = [c["name"] for c in report["checks"] if c["status"] == "failed"]
    print(f"{report['seconds']:.0f} s; written: {files[0]}, {files[1].name}"
          + (f"; not correct on this device: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__": sys.exit(main())
