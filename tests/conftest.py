"Shared pieces: tiny models with weights away from their zero initialisation, and a folder for runs."
import csv
import os
import re
import shutil
import signal
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""   # the same numbers on every machine
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")   # torch reads it when it is imported

import nbformat
import pytest
import torch
from PIL import Image
from diffusers import DiTTransformer2DModel

from dmp_wb.core.paths import project_root
from dmp_wb.models.dit import DiT

# a shell starts what runs in the background deaf to interrupts, and its children after it
signal.signal(signal.SIGINT, signal.default_int_handler)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None and os.environ.get("DMP_WB_REQUIRE_BROWSER"):
    raise RuntimeError("no Chromium on this machine: apt-get install chromium")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def randomise(module, std=0.05, seed=0):
    "Normal weights everywhere, so that nothing is hidden behind a zero-initialised layer."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters(): p.copy_(torch.randn(p.shape, generator=g) * std)
    return module


def tiny_dit(**changes):
    return randomise(DiT(**{**dict(sample_size=8, in_channels=1, hidden_size=32, num_layers=3, num_attention_heads=4,
                                   num_classes=10), **changes})).eval()


def tiny_diffusers_dit():
    return randomise(DiTTransformer2DModel(sample_size=8, in_channels=1, out_channels=1, num_layers=3,
                                           num_attention_heads=4, attention_head_dim=8,
                                           norm_num_groups=1, num_embeds_ada_norm=10)).eval()


def run_cells(name, **parameters):
    "A run notebook's code in this process, which is quicker than a kernel; gives its variables."
    space = {}
    for cell in nbformat.read(project_root() / "nbs" / "runs" / f"{name}.ipynb", 4).cells:
        if cell.cell_type != "code": continue
        if "parameters" in cell.metadata.get("tags", []):
            assert parameters.keys() <= set(re.findall(r"^(\w+) =", cell.source, re.M))
        exec(cell.source, space)
        if "parameters" in cell.metadata.get("tags", []):
            space |= {k: str(v) if isinstance(v, Path) else v for k, v in parameters.items()}
    return space


@pytest.fixture(params=[tiny_dit, tiny_diffusers_dit], ids=["DiT", "DiTTransformer2DModel"])
def backbone(request): return request.param()


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, 1, 8, 8, generator=g), torch.tensor([0, 300, 600, 999]), torch.tensor([0, 4, 9, 10])


@pytest.fixture(autouse=True)
def environment():
    "What a test leaves in the environment, as the name of a plug-in is left there, is no other test's business."
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys(): del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def runs_folder(tmp_path, monkeypatch, environment):
    monkeypatch.setenv("DMP_WB_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture(scope="session", name="photos")
def captioned_photos(tmp_path_factory):
    "A folder of six pictures of 32 × 32, with metadata.csv."
    folder = tmp_path_factory.mktemp("photos")
    from trained_pipelines import CAPTIONS
    g = torch.Generator().manual_seed(0)
    with open(folder / "metadata.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["file_name", "text"])
        for i, caption in enumerate(CAPTIONS):
            pixels = torch.randint(256, (3, 4, 4), generator=g).float()
            pixels = torch.nn.functional.interpolate(pixels[None], size=32, mode="bilinear")[0]
            Image.fromarray(pixels.byte().permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
            rows.writerow([f"{i}.png", caption])
    return folder


@pytest.fixture(scope="session", name="folders")
def pipeline_folders(tmp_path_factory):
    "By its class's name, the folder of a tiny pipeline, made when it is first asked for."
    made = {}

    def folder(name):
        from trained_pipelines import TRAINED   # whose imports take a while
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            TRAINED[name][0](made[name] / "scratch").save_pretrained(made[name] / "pipe")
        return made[name] / "pipe"
    return folder
