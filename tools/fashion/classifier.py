"""The feature network for Fashion-MNIST: as `DigitClassifier`, for 28 × 28 images, with 96 features.

    python long/classifier.py [EPOCHS]      # trains it: results/fashion-classifier/model.safetensors and report.json
"""
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from dmp_wb.core import seed_of
from dmp_wb.data import DataConfig, load_images
from dmp_wb.metrics import Extractor, fingerprint

FOLDER = Path(__file__).parents[1] / "results" / "fashion-classifier"


class FashionClassifier(nn.Module):
    "1 × 28 × 28 images in [−1, 1] → logits of 10 classes; `features` gives the 96 activations before them."
    num_features = 96

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(24), nn.GELU(),
            nn.Conv2d(24, 48, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(48), nn.GELU(),
            nn.Conv2d(48, 64, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.GELU(), nn.Flatten(),
            nn.Linear(64 * 9, self.num_features), nn.GELU())
        self.head = nn.Linear(self.num_features, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor: return self.body(images)
    def forward(self, images: torch.Tensor) -> torch.Tensor: return self.head(self.body(images))


class FashionFeatures(Extractor):
    "The trained classifier as an extractor of dmp_wb: 96 features, logits of 10 classes."
    name, width, gives = "fashion", 96, ("features", "logits")

    def __init__(self):
        super().__init__()
        self.network = FashionClassifier()
        self.network.load_state_dict(load_file(FOLDER / "model.safetensors"))
        self.eval().requires_grad_(False)
        self.weights = fingerprint(self.network)

    def forward(self, images):
        features = self.network.body(images)
        return {"features": features, "logits": self.network.head(features)}


def fashion(split: str) -> tuple[torch.Tensor, torch.Tensor]: # images [N, 1, 28, 28] in [−1, 1], labels [N]
    "A split, whole; kept as one file of tensors beside the pictures, which are read once."
    kept = Path(f"data/fashion-{split}.safetensors")
    if not kept.is_file():
        data = load_images(DataConfig(name="data/fashion", split=split, size=28, channels=1))
        images = torch.cat([data.batch(rows)["images"] for rows in torch.arange(len(data)).split(1000)])
        save_file({"images": ((images + 1) * 127.5).round().byte(), "labels": data.labels}, kept)
    found = load_file(kept)
    return found["images"].float() / 127.5 - 1, found["labels"]


def train_fashion_classifier(seed: int = 0, epochs: int = 8) -> tuple[FashionClassifier, float]:
    "AdamW, one-cycle to 3e-3, batch 128, shifts of up to one pixel, noise of 0.05, label smoothing 0.05."
    images, labels = fashion("train")
    test_images, test_labels = fashion("test")
    g = torch.Generator().manual_seed(seed_of(seed, "fashion-classifier"))
    torch.manual_seed(seed_of(seed, "fashion-classifier-init"))
    model = FashionClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = len(images) // 128
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    for epoch in range(epochs):
        for rows in torch.randperm(len(images), generator=g)[:128 * steps].split(128):
            dy, dx = torch.randint(3, (2,), generator=g).tolist()
            x = F.pad(images[rows], (1, 1, 1, 1), value=-1.0)[:, :, dy:dy + 28, dx:dx + 28]
            x = x + 0.05 * torch.randn(x.shape, generator=g)
            F.cross_entropy(model(x), labels[rows], label_smoothing=0.05).backward()
            optimizer.step(); rate.step(); optimizer.zero_grad()
        accuracy = right(model.eval(), test_images, test_labels); model.train()
        print(f"epoch {epoch + 1}: {accuracy:.4f}", flush=True)
    return model.eval(), accuracy


@torch.no_grad()
def right(model, images, labels) -> float:
    return float((torch.cat([model(part).argmax(1) for part in images.split(1000)]) == labels).float().mean())


if __name__ == "__main__":
    started, epochs = time.process_time(), int(sys.argv[1]) if len(sys.argv) > 1 else 8
    model, accuracy = train_fashion_classifier(epochs=epochs)
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), FOLDER / "model.safetensors")
    report = {"test_accuracy": accuracy, "epochs": epochs, "parameters": sum(p.numel() for p in model.parameters()),
              "bytes": (FOLDER / "model.safetensors").stat().st_size,
              "cpu_seconds": round(time.process_time() - started)}
    (FOLDER / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(report)
