"""Fill the disk under every command that writes, at many moments, and see
that nothing old is lost, one line is said, and that it goes on later.

`python tools/drills/full_disk.py [--points 6]` (as root: it mounts a small tmpfs in a mount namespace of its own).
For each command the drill
first learns how many bytes it writes, then lets it meet a full disk at several places on the way. Right is:
a status that is not 0, one line on
stderr (and no traceback), files that were there before with the same
bytes, and, once there is room, the same result as on a large disk.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

SIZE = 64 << 20   # bytes of the disk
SPARE = 1 << 14   # bytes that a tmpfs needs for its own pages


@dataclass
class Case:
    "A command, what is there before it, and what must be there after it."
    name: str
    words: list[str]                                 # of `dmp-wb`
    prepare: Callable[[Path], None] = lambda disk: None
    result: Callable[[Path], dict] = lambda disk: {}   # what has to be equal on a large disk and after a full one


def weights(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes()
            for f in sorted(folder.rglob("*.safetensors")) if "checkpoints" not in f.parts}
def pictures(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*.png"))}
def figures(folder: Path) -> dict:
    return {f"{f.relative_to(folder)}": len(f.read_text().splitlines()) for f in folder.rglob("metrics.jsonl")}


def copy_run(disk: Path):
    from dmp_wb.core.paths import assets_folder
    shutil.copytree(assets_folder() / "digits-dmp", disk / "old")


TRAINING = ["train.steps=9", "train.checkpoint_every=3", "train.log_every=1", "train.batch_size=8", "train.cpu=true",
            "train.sample_every=3", "train.sample_steps=2", "train.sample_images=4"]


def cases(inputs: Path) -> list[Case]:
    small = ["model.hidden_size=16", "model.num_layers=1", "model.num_attention_heads=2"]
    return [
        Case("train, from scratch", ["train", "digits-quick", *TRAINING, *small, "--folder", "{disk}/run"],
             result=lambda d: weights(d / "run") | figures(d / "run")),
        Case("train, DMP", ["train", "digits-dmp", *TRAINING, "--folder", "{disk}/run"],
             result=lambda d: weights(d / "run") | figures(d / "run")),
        Case("sample", ["sample", "digits-base", "12", "--folder", "{disk}/samples", "--sampler", "ddim", "--steps",
                        "2", "--batch-size", "4", "--cpu"], result=lambda d: pictures(d / "samples")),
        Case("latents", ["latents", f"{inputs}/photos", "{disk}/cache", "--vae", f"{inputs}/vae", "--size", "16",
                         "--images-per-shard", "16", "--num-workers", "0", "--cpu"],
             result=lambda d: weights(d / "cache")),
        Case("evaluate", ["evaluate", "{disk}/old", "--num-images", "32", "--num-inference-steps", "2", "--metrics",
                          "fid"], copy_run),
        Case("guidance", ["guidance", "{disk}/old", "1", "2", "--num-images", "16", "--num-inference-steps", "2",
                          "--metrics", "fid", "--figure", "{disk}/curves.png"], copy_run),
        Case("new", ["new", "{disk}/project"], result=lambda d: {
            str(f.relative_to(d)): f.stat().st_size for f in sorted((d / "project").rglob("*")) if f.is_file()}),
        Case("run", ["run", "gates", "-p", "model", "digits-dmp", "--folder", "{disk}/gates"],
             result=lambda d: {"page": (d / "gates" / "run.html").is_file()}),
        Case("compare", ["compare", "digits-dmp", "digits-base", "--num-images", "4", "--num-inference-steps", "2",
                         "--output", "{disk}/compare.html"], result=lambda d: {"page": (d / "compare.html").is_file()}),
    ]


def call(words: list[str], disk: Path) -> tuple[int, str]: # status, stderr
    "A command in a fork of this process, which has imported everything."
    log = disk.with_name("stderr.txt")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.environ.update(DMP_WB_RUNS=str(disk / "runs"), TMPDIR=str(disk.parent / "tmp"))
            tempfile.tempdir = None
            for stream, to in ((1, os.devnull), (2, str(log))):
                os.dup2(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.argv = ["dmp-wb", *words]
            from dmp_wb.cli import main
            main()
            status = 0
        except SystemExit as e: status = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException: traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), log.read_text(errors="replace")


def said(stderr: str) -> list[str]:
    "The lines of an error output that are no progress."
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line.split("\r")[-1]).strip() for line in stderr.splitlines()]
    return [line for line in lines if re.match(r"error|warning|stopped|interrupted|Traceback|\w*Error", line)]


class Disk:
    "A tmpfs of its own, empty at each start."
    def __init__(self, folder: Path): self.folder = folder
    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(self.folder)], check=True)
        return self

    def __exit__(self, *_): subprocess.run(["umount", "-l", str(self.folder)], check=True)

    @property
    def free(self) -> int: return os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_bsize

    def fill(self, leave: int):
        "Take all but so many bytes."
        with open(self.folder / "ballast", "wb") as f: os.posix_fallocate(f.fileno(), 0, max(1, self.free - leave))

    def empty(self): (self.folder / "ballast").unlink()


def old_files(disk: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in sorted((disk / "old").rglob("*")) if f.is_file()}


def drill(case: Case, points: int, work: Path) -> list[str]: # what was wrong, one entry a situation
    words = [w.replace("{disk}", str(work / "disk")) for w in case.words]
    with Disk(work / "disk") as disk:
        case.prepare(disk.folder)
        before = disk.free
        status, stderr = call(words, disk.folder)
        if status: return [f"does not work on a large disk: {stderr[-500:]}"]
        need, want = before - disk.free, case.result(disk.folder)
    wrong = []
    for i in range(points):
        faults = []
        with Disk(work / "disk") as disk:
            case.prepare(disk.folder)
            old = old_files(disk.folder)
            disk.fill(int(need * i / points) + (SPARE if i else 0))
            status, stderr = call(words, disk.folder)
            lines = said(stderr)
            if "Traceback" in stderr: faults.append("a traceback: " + stderr.strip().splitlines()[-1][:200])
            elif status and len(lines) != 1:
                faults.append(f"{len(lines)} lines: {' | '.join(lines)[:300] or stderr[-300:]}")
            elif status == 0 and case.result(disk.folder) != want: faults.append("status 0 without its result")
            changed = [f for f, data in old.items()
                       if not Path(f).is_file() or not Path(f).name == "summary.json" and Path(f).read_bytes() != data]
            if changed: faults.append(f"{changed[0]} is lost or changed")
            disk.empty()
            status, stderr = call(words, disk.folder)
            if status: faults.append(f"with room again, status {status}: {' | '.join(said(stderr))[-300:]}")
            elif case.result(disk.folder) != want: faults.append("with room again, another result")
            if left := [str(f.relative_to(disk.folder)) for f in disk.folder.rglob("*.tmp")]:
                faults.append(f"left over: {left[0]}")
        if faults: wrong.append(f"at {i}/{points}: " + "; ".join(faults))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=6, help="full disks for each command")
    parser.add_argument("--only", default="", help="commands that begin with one of these, separated by commas")
    a = parser.parse_args()
    if "DMP_WB_OWN_MOUNTS" not in os.environ:
        if os.geteuid() or not shutil.which("unshare"):
            sys.exit("full_disk.py needs root and unshare: it mounts a small disk in a mount namespace of its own")
        os.execvpe("unshare", ["unshare", "-m", sys.executable, *sys.argv], {**os.environ, "DMP_WB_OWN_MOUNTS": "1"})
    for module in ("training", "sampling", "metrics", "compare", "sweeps", "runs", "viz", "patching", "projects"):
        __import__(f"dmp_wb.{module}")
    __import__("papermill"), __import__("sklearn.datasets"), __import__("torch.utils.tensorboard")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as d:
        work = Path(d)
        (work / "tmp").mkdir()
        sys.path.insert(0, str(Path(__file__).parent))
        from kill_sampling import make_inputs
        make_inputs(work)
        situations = faults = 0
        for case in cases(work):
            if not case.name.startswith(tuple(a.only.split(","))): continue
            begun = time.monotonic()
            wrong = drill(case, a.points, work)
            situations, faults = situations + a.points, faults + len(wrong)
            print(f"{case.name:20} {a.points - len(wrong)} of {a.points} right ({time.monotonic() - begun:.0f} s)"
                  + "".join(f"\n    {w}" for w in wrong), flush=True)
    print(f"{situations - faults} of {situations} full disks: one line, nothing old lost, the same result once there "
          "is room")
    return min(faults, 1)


if __name__ == "__main__": sys.exit(main())
