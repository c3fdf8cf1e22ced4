"""How fast images come out of a folder, against a loader as one writes it with Pillow and torch, and what it costs to
list a folder of many files.

`python tools/benchmarks/data.py [--images 24] [--rounds 15] [--files 100000]`. The JPEGs are made anew in a temporary
folder, in several shapes; both loaders read the same batch in alternating rounds in one process, and give the same
bits. Times are those of the CPU, in milliseconds an image: median [quartiles]. The ratio is that of the throughputs,
ours over the plain one's, over pairs of rounds.
"""
import argparse
import pickle
import resource
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from dmp_wb.core.settings import DataConfig
from dmp_wb.data.folders import image_folder

SHAPES = {"256 × 256": [(256, 256)], "500 × 375 and 375 × 500": [(500, 375), (375, 500)],
          "640 × 480": [(640, 480)], "1024 × 768 and 768 × 1024": [(1024, 768), (768, 1024)],
          "1600 × 1200": [(1600, 1200)]}


def photo(seed: int, width: int, height: int) -> Image.Image:
    "Soft colours and a little noise: about as many bytes a pixel as a photograph."
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8))
    pixels = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((pixels + rng.normal(0, 5, pixels.shape).astype(int)).clip(0, 255).astype(np.uint8))


def plain_crop(image: Image.Image, size: int) -> Image.Image:
    "ADM's crop, as its own code does it."
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def plain_batch(files: list[Path], size: int) -> torch.Tensor: # [B, 3, size, size]
    images = []
    for file in files:
        with Image.open(file) as image: image = ImageOps.exif_transpose(image).convert("RGB")
        images.append(torch.from_numpy(np.array(plain_crop(image, size))).permute(2, 0, 1).float() / 127.5 - 1)
    return torch.stack(images)


def cpu(work) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def spread(values, scale=1.0) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{scale * middle:.3g} [{scale * low:.3g}–{scale * high:.3g}]"


def reading(images: int, rounds: int, size: int = 256):
    print("| JPEGs of | plain, ms | ours, ms | ours/plain, throughput |\n|---|---|---|---|")
    for name, shapes in SHAPES.items():
        with tempfile.TemporaryDirectory() as d:
            for i in range(images):
                photo(i, *shapes[i % len(shapes)]).save(Path(d) / f"{i:04d}.jpg", quality=90)
            files, data, order = sorted(Path(d).iterdir()), image_folder(DataConfig(d, size=size)), torch.arange(images)
            assert torch.equal(plain_batch(files, size), data.batch(order)["images"])
            plain, ours = [], []
            for n in range(rounds):
                pair = [(plain, partial(plain_batch, files, size)), (ours, partial(data.batch, order))]
                for times, work in pair[::-1 if n % 2 else 1]: times.append(cpu(work))
        print(f"| {name} | {spread(plain, 1e3 / images)} | {spread(ours, 1e3 / images)} | "
              f"{spread([p / o for p, o in zip(plain, ours)])} |", flush=True)


def listing(files: int, rounds: int = 5):
    with tempfile.TemporaryDirectory() as d:
        for n in range(0, files, 1000):
            folder = Path(d) / f"class-{n // 1000 % 10}" / f"{n // 10000:04d}"
            folder.mkdir(parents=True)
            for i in range(n, min(n + 1000, files)): (folder / f"photo-{i:07d}.jpg").touch()
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        before, times = peak(), []
        for _ in range(rounds):
            begun = time.process_time()
            data = image_folder(DataConfig(d, size=64))
            times.append(time.process_time() - begun)
        assert len(data) == files and len(data.class_names) == min(10, -(-files // 1000))
    print(f"{files:,} files listed in {spread(times)} s of CPU, {spread([t * 1e6 / files for t in times])} s a "
          f"million; memory peaked {peak() - before:.0f} MB higher; "
          f"pickled {len(pickle.dumps(data)) / 2**20:.1f} MB in "
          f"{cpu(lambda: pickle.dumps(data)):.3f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--files", type=int, default=100_000)
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.files: listing(a.files)
    if a.images: reading(a.images, a.rounds)


if __name__ == "__main__": main()
