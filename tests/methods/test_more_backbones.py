"Every further class of diffusers that is supported, as a tiny model with random weights, through `wb.check_backbone`."
import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import randomise
from more_backbones import CASES, CLASSES, build

import dmp_wb as wb
from dmp_wb.core.paths import project_root
from dmp_wb.methods.check import output_of


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


def test_the_page_of_backbones_has_the_table_that_the_tool_makes(monkeypatch):
    monkeypatch.syspath_prepend(project_root() / "tools")
    import backbone_sizes
    assert set(backbone_sizes.PUBLISHED) == {n for n in wb.supported_models() if n in CLASSES} | {"DiT"}
    assert set(backbone_sizes.LICENCES) <= set(backbone_sizes.PUBLISHED)
    page = (project_root() / "nbs" / "howto" / "backbone.ipynb").read_text(encoding="utf-8")
    text = "\n".join("".join(cell["source"]) for cell in json.loads(page)["cells"])
    lines = {line.split("`")[1]: line for line in text.splitlines() if re.match(r"\| `\w+` \|.* M, .* %", line)}
    counts = re.compile(r"[\d,.]+ M(, [\d.]+ %)?")
    for name in backbone_sizes.PUBLISHED:
        assert counts.sub("", backbone_sizes.row(name, (1, 1, 1))) == counts.sub("", lines[name])
    for name in ("DiT", "PRXTransformer2DModel", "UNet2DConditionModel"): assert backbone_sizes.row(name) == lines[name]


def narrow(value):
    "As a pipeline in half precision gives its inputs."
    if isinstance(value, dict): return {k: narrow(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return type(value)(map(narrow, value))
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in CASES if n != "Kandinsky5Transformer3DModel"])   # in float32 or on a GPU
def test_half_precision_and_copies(name):
    model, size = build(name).bfloat16(), CASES[name][2]
    inputs = narrow(CASES[name][1]())
    randomise(wb.patch(model, wb.DMPConfig(input_size=size and list(size), gate_input="condition")), 0.3)
    wb.route(model)
    out = output_of(model, inputs)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert torch.equal(output_of(copy.deepcopy(model), inputs), out)


def test_prepended_prompts_where_blocks_take_any_number_of_tokens():
    name = "CogView3PlusTransformer2DModel"
    model, inputs = build(name), CASES[name][1]()
    with torch.no_grad():
        plain = output_of(model, inputs)
        randomise(wb.patch(model, wb.DMPConfig(mode="prepend", num_prompts=3, depth=2)), 0.3)
        assert output_of(model, inputs).shape == plain.shape and not torch.allclose(output_of(model, inputs), plain)
        assert torch.equal(output_of(wb.unpatch(model), inputs), plain)


@torch.no_grad()
@pytest.mark.parametrize("name", ["LTXVideoTransformer3DModel", "ZImageTransformer2DModel"])
def test_a_patched_and_routed_model_is_one_graph(name):
    model, inputs = build(name), CASES[name][1]()
    randomise(wb.patch(model, wb.DMPConfig(input_size=list(CASES[name][2]))), 0.3)
    wb.route(model)
    plain = output_of(model, inputs)
    assert torch.allclose(output_of(torch.compile(model, backend="eager", fullgraph=True), inputs), plain, atol=1e-4)
