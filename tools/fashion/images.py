"""Writes Fashion-MNIST as class folders of PNG files, from
the IDX files of Debian's dataset-fashion-mnist (MIT licence).

    python tools/fashion/images.py TARGET [IDX_FOLDER]     # writes TARGET/train|test/<class>/NNNNN.png
"""
import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ["0_t-shirt", "1_trouser", "2_pullover", "3_dress", "4_coat", "5_sandal", "6_shirt", "7_sneaker", "8_bag",
         "9_ankle-boot"]

target = Path(sys.argv[1])
source = Path(sys.argv[2] if len(sys.argv) > 2 else "/usr/share/datasets/fashion-mnist")
for split, prefix, n in (("train", "train", 60000), ("test", "t10k", 10000)):
    images = np.frombuffer(gzip.open(source / f"{prefix}-images-idx3-ubyte.gz").read()[16:], np.uint8).reshape(n, 28,
                                                                                                               28)
    labels = np.frombuffer(gzip.open(source / f"{prefix}-labels-idx1-ubyte.gz").read()[8:], np.uint8)
    for name in NAMES: (target / split / name).mkdir(parents=True, exist_ok=True)
    for i, (image, label) in enumerate(zip(images, labels)):
        Image.fromarray(image).save(target / split / NAMES[label] / f"{i:05d}.png", compress_level=1)
