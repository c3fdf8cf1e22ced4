"""CPU time in which one of several processes draws its batch: `python tools/benchmarks/batches.py [--processes 8]`.

Cached latents, and batch format 1 against 2 in turn, one round after another in one process; before is format 1 with
a read for each image, as dmp_wb 0.1 did both. Quartiles stand beside the medians. A gigabyte in the folder for
temporary files; no GPU, no network.
"""
import argparse
import bisect
import hashlib
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from dmp_wb.config import Experiment, TrainConfig
from dmp_wb.core.files import write_json
from dmp_wb.data.cache import LatentCache
from dmp_wb.data.cache_facts import CACHE_FILE, CACHE_FORMAT
from dmp_wb.data.encoders import draw_latents
from dmp_wb.data.sources import EpochOrder
from dmp_wb.training.batches import draw_batch, places_of

TARGET = 0.02   # seconds at 4 × 32 × 32


def write_cache(folder: Path, side: int, images: int, per_shard: int) -> Path:
    "A cache of random moments, as `dmp-wb latents` would write it, without a VAE."
    folder.mkdir()
    entries = []
    for number in range(images // per_shard):
        content = save({"moments": torch.randn(per_shard, 2, 8, side, side) / 4}, {"shard": str(number)})
        file = folder / f"shard-{number:05d}.safetensors"
        file.write_bytes(content)
        entries.append({"file": file.name, "images": per_shard, "bytes": len(content), "skipped": {},
                        "sha256": hashlib.sha256(content).hexdigest()})
    none = dict.fromkeys(("text_encoder", "text_fingerprint", "text_length", "caption_column", "null_sha256"))
    write_json(folder / CACHE_FILE, {
        "format": CACHE_FORMAT, "data": "random", "size": 8 * side, "channels": 3, "images": images, "class_names": [],
        "list": "", "vae": "none", "vae_fingerprint": "", "scale": 0.18215, "shift": 0.0, "source": {}, **none,
        "latent_shape": [4, side, side], "images_per_shard": per_shard, "dtype": "float32", "shards": entries})
    return folder


class OneByOne(LatentCache):
    "Reads each image by itself, and stacks them."
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.files = [safe_open(folder / entry["file"], "pt").__enter__() for entry in self.facts["shards"]]
        self.ends = self._starts.tolist()

    def batch(self, indices, flip=None, noise=None, drop=None):
        rows = []
        for index in indices.tolist():
            shard = bisect.bisect_right(self.ends, index) - 1
            row = index - self.ends[shard]
            rows.append(self.files[shard].get_slice("moments")[row:row + 1, 0:1][0, 0])
        return {"images": draw_latents(torch.stack(rows), noise, self.facts["scale"], self.facts["shift"])}


def measure(side: int, images: int, args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(Path(folder) / "cache", side, images, per_shard=128)
        places = places_of(args.batch, 1, rank=args.processes // 2, world_size=args.processes)
        order = EpochOrder(images, args.batch, 0)
        make = lambda number: Experiment(train=TrainConfig(batch_size=args.batch, batch_format=number))
        ways = {"before": (make(1), OneByOne(cache)), "format 1": (make(1), LatentCache(cache)),
                "format 2": (make(2), LatentCache(cache))}
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for step in range(args.rounds + 1):
            for way, (exp, data) in ways.items():
                start = time.process_time()
                draw_batch(exp, data, order, step, None, places)
                if step: taken[way].append(time.process_time() - start)   # the first round reads the files
    print(f"4 × {side} × {side}, batch {args.batch}, one of {args.processes} processes, {args.rounds} rounds")
    for way, seconds in taken.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        note = f"target {TARGET}: {'met' if middle <= TARGET else 'MISSED'}" if way == "format 2" and side == 32 else ""
        ratio = statistics.median(a / b for a, b in zip(taken["before"], seconds, strict=True))
        print(f"  {way:10}{middle:9.4f} s  ({low:.4f} to {high:.4f}){ratio:8.1f} × as fast   {note}".rstrip())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2048, help="images a step, over all processes")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    measure(32, 4 * args.batch, args)
    measure(64, args.batch, args)


if __name__ == "__main__": main()
