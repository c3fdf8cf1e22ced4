"""Slanted digits: scikit-learn's 1,797 digits under an affine shear, as class folders of 8 × 8 PNG files.

    python long/slanted.py data/digits-slanted [SHEAR]    # SHEAR:
    columns that the picture moves by from one row to the next, 0.4
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from dmp_wb.data import digits


def sheared(images: torch.Tensor, shear: float = 0.4) -> torch.Tensor: # [N, C, H, W] in [−1, 1], the same
    "The upper half leans to the right, the lower half to the left; what comes in from outside is background, −1."
    side = images.shape[-1]
    place = (torch.arange(side, dtype=images.dtype) + 0.5) * 2 / side - 1   # of pixel centres
    y, x = torch.meshgrid(place, place, indexing="ij")
    grid = torch.stack([x + shear * y, y], -1).expand(len(images), -1, -1, -1)
    return F.grid_sample(images + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1


if __name__ == "__main__":
    target, shear = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.4
    data = digits()
    for i, (image, label) in enumerate(zip(sheared(data.images, shear), data.labels.tolist())):
        (target / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(((image[0] + 1) * 127.5).round().byte().numpy()).save(target / str(label) / f"{i:04d}.png")
