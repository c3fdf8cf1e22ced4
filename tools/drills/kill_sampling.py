"""Kill `dmp-wb sample` and `dmp-wb latents` at random moments, start them
again, and compare the folders with those of a job that nobody touched.

`python tools/drills/kill_sampling.py [--kills 20]`: each command in one process and in two.
Children are forked from a parent that has imported
everything; SIGKILL hits one of them or all at once.
Every file must have the same bytes in the end, and nothing else may be left in the folder.
"""
import argparse
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from dmp_wb.core.settings import DataConfig
from dmp_wb.data.cache import write_cache
from dmp_wb.data.cache_facts import CACHE_FILE
from dmp_wb.evaluation.sample_files import sample_run, SAMPLES_FILE

IMAGES = 160
# who wrote last, and when a shard was last verified
NOT_COMPARED = (".lock", ".verified.lock", ".verified.json")


def make_inputs(folder: Path):
    "A folder of images, and a tiny VAE that encodes them."
    draw = np.random.default_rng(0)
    for i in range(IMAGES):
        (folder / "photos" / f"class {i % 4}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), np.uint8)).save(
            folder / "photos" / f"class {i % 4}" / f"{i:03d}.png")
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                  up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
                  latent_channels=4, sample_size=16).save_pretrained(folder / "vae")


def sample(inputs: Path, folder: Path, rank: int, world: int):
    sample_run("digits-dmp", IMAGES, folder, num_inference_steps=6, sampler="ddim", batch_size=4, part=(rank, world),
               device="cpu", quiet=True)


def latents(inputs: Path, folder: Path, rank: int, world: int):
    config = DataConfig(name=str(inputs / "photos"), size=16, vae=str(inputs / "vae"), num_workers=0)
    write_cache(config, folder, batch_size=4, images_per_shard=16, part=(rank, world), say=lambda line: None)


JOBS = {"sample": (sample, SAMPLES_FILE), "latents": (latents, CACHE_FILE)}


def start(job, inputs: Path, folder: Path, world: int) -> list[int]:
    "Fork the processes of a job; returns their ids."
    children = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.setpgid(0, 0)
                torch.set_num_threads(1)
                warnings.simplefilter("ignore")
                with contextlib.redirect_stderr(io.StringIO()): job(inputs, folder, rank, world)
                status = 0
            except BaseException: folder.with_name(f"{folder.name}.error").write_text(traceback.format_exc())
            finally: os._exit(status)
        children.append(pid)
    return children


def wait(children: list[int]) -> bool: return all([os.waitpid(pid, 0)[1] == 0 for pid in children])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes()
            for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in NOT_COMPARED}


def drill(name: str, world: int, kills: int, folder: Path,
          seed: int = 0) -> tuple[list[int], list[str]]:   # files there after each kill, what is wrong
    draw, (job, last) = random.Random(f"{seed} {name} {world}"), JOBS[name]
    begun = time.monotonic()
    if not wait(start(job, folder, folder / "whole", world)): raise RuntimeError((folder / "whole.error").read_text())
    life, broken, seen = time.monotonic() - begun, folder / "broken", []
    while len(seen) < kills:
        if (broken / last).exists():   # it was finished between two kills: another one is begun
            if wrong := ended(job, folder, broken, world): return seen, wrong
            broken = folder / f"broken-{len(seen)}"
        children = start(job, folder, broken, world)
        time.sleep(draw.uniform(0, life if len(seen) % 3 else 0.2 * life))
        for pid in children if draw.random() < 0.5 else children[:1]: os.kill(pid, signal.SIGKILL)
        if draw.random() < 0.5:   # the others go on, or go down as well
            for pid in children: os.kill(pid, signal.SIGKILL)
        for pid in children: os.waitpid(pid, 0)
        seen.append(len(contents(broken)) if broken.exists() else 0)
    return seen, ended(job, folder, broken, world)


def ended(job, folder: Path, broken: Path, world: int) -> list[str]:
    "Start it once more, which removes what killed processes left; what is wrong then."
    if not wait(start(job, folder, broken, world)): return [(folder / f"{broken.name}.error").read_text()]
    return difference(folder, broken)


def difference(folder: Path, broken: Path) -> list[str]:
    "What is not as in the job that nobody touched."
    whole, found = contents(folder / "whole"), contents(broken)
    return ([f"{f} is left over" for f in found.keys() - whole.keys()]
            + [f"{f} is missing" for f in whole.keys() - found.keys()] + [
                f"{f} has other bytes" for f in whole.keys() & found.keys() if whole[f] != found[f]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    faults = 0
    for name in JOBS:
        for world in (1, 2):
            with tempfile.TemporaryDirectory() as d:
                begun = time.monotonic()
                make_inputs(Path(d))
                seen, wrong = drill(name, world, a.kills, Path(d), a.seed)
                found = ("WRONG: " + "; ".join(wrong) if wrong
                         else "every file has the same bytes, nothing is left over")
                print(f"{name:8} {world} process{'es' if world > 1 else '  '}  killed {len(seen)} times; files there "
                      f"after each: {' '.join(map(str, seen))}; {found} ({time.monotonic() - begun:.0f} s)", flush=True)
                faults += bool(wrong)
    return faults


if __name__ == "__main__": sys.exit(main())
