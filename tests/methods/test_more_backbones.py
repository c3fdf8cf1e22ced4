"Every further class of diffusers that is supported, as a tiny model with random weights, through `wb.check_backbone`."
import re
import subprocess
import sys

import pytest
import torch
from more_backbones import CASES, CLASSES, build

import dmp_wb as wb
from dmp_wb.core.paths import project_root


@pytest.mark.parametrize("name", list(CASES))
def test_every_claim_of_the_class_holds(name):
    check = wb.check_backbone(build(name), CASES[name][1](), CASES[name][2])
    assert check.holds, check


def test_every_registered_class_is_checked():
    assert {n for n in wb.supported_models() if n.endswith(("Model", "UNet", "DiT"))} <= CLASSES


def test_the_package_knows_classes_without_importing_them():
    code = ("import sys, dmp_wb; dmp_wb.supported_models(); "
            "print([m for m in sys.modules if m.startswith('diffusers.models.transformers.')])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_class_of_a_newer_diffusers_is_told_its_nearest_relative():
    class Flux4Transformer2DModel(torch.nn.Module): pass
    with pytest.raises(wb.BadInput, match="its nearest relative is Flux.*Transformer2DModel; add yours with"):
        wb.patch(Flux4Transformer2DModel())


def test_the_page_of_backbones_lists_every_class_with_its_sizes():
    page = (project_root() / "nbs" / "howto" / "backbone.ipynb").read_text(encoding="utf-8")
    listed = set(re.findall(r"\| `(\w+)` \| [^|]+ \| [^|]* \| [\d,]+ M \|", page))
    assert listed == {n for n in wb.supported_models() if n in CLASSES} | {"DiT"}
