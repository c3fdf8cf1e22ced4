"`wb.check_backbone`: what holds of a registration, held against the model itself."
import dataclasses

import pytest
import torch
from backbones import BACKBONES, INPUT_SIZE, inputs_for
from conftest import tiny_dit

import dmp_wb as wb
from dmp_wb.models.anatomy import _ANATOMIES
from dmp_wb.models.dit import DiT


@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_claim_of_every_known_class_holds(name):
    check = wb.check_backbone(BACKBONES[name](), inputs_for(name), INPUT_SIZE.get(name))
    assert check.holds and len(check.findings) == 14, check


@pytest.fixture
def changed():
    "Registers a class with some claims changed, until the test ends."
    kept = {}

    def change(name, **claims):
        kept.setdefault(name, _ANATOMIES[name])
        wb.register_backbone(name, dataclasses.replace(kept[name], **claims))
    yield change
    for name, anatomy in kept.items(): wb.register_backbone(name, anatomy)


DIT, FLUX, AURA = DiT, "FluxTransformer2DModel", "AuraFlowTransformer2DModel"


@pytest.mark.parametrize("name,claims,failed,says", [
    (DIT, {"embed_timestep": lambda m, t: m.t_embedder(t / 1000)}, {"embedding"}, "no part of the model"),
    (DIT, {"condition": lambda m, t, i: 2 * m.t_embedder(t)}, {"condition"}, "gives this condition"),
    (DIT, {"width": lambda m: 16}, {"blocks", "routing"}, "block 0 takes tokens of width 32: the anatomy says 16"),
    (DIT, {"blocks": lambda m: [*m.blocks, torch.nn.Identity()]}, {"blocks"}, "the model does not call block 3"),
    (DIT, {"grid_size": lambda m: (4, 5)}, {"tokens"}, "block 0 takes 16 tokens: the anatomy says 4 × 5 of the image"),
    (DIT, {"timestep_scale": lambda m: 1000.0}, {"time"}, "lies at 300000: expected 0 to 1000"),
    (FLUX, {"timestep_scale": lambda m: -1000.0, "timestep_start": lambda m: 1000.0}, {"time"}, "a scheduler's 900"),
    (FLUX, {"tokens_output": 0}, {"tokens"}, ""),
    (AURA, {"leading_tokens": None,
            "trailing_tokens": lambda m, i: [0] * 2 + [13] * 2}, {"tokens"}, "token 0 of block 3 does not reach the "
     "output: the anatomy calls it the image's"),
])
def test_a_wrong_claim_is_named(changed, name, claims, failed, says):
    key = "DiT" if name is DiT else name
    changed(name, **claims)
    check = wb.check_backbone(BACKBONES[key](), inputs_for(key), INPUT_SIZE.get(key))
    assert failed & {*check.failed}, check
    assert any(says in check[f].says for f in check.failed), check
    with pytest.raises(wb.BadInput, match=f"{key} fails"):
        wb.check_backbone(BACKBONES[key](), inputs_for(key), INPUT_SIZE.get(key), raises=True)


def test_a_table_is_read_as_text_and_as_html():
    check = wb.check_backbone(BACKBONES["DiT"](), inputs_for("DiT"))
    assert "14 of 14 hold" in repr(check) and "identity" in repr(check) and "<table>" in check._repr_html_()


def test_the_model_is_left_as_it_was():
    model = BACKBONES["DiT"]().train()
    next(model.parameters()).requires_grad_(False)
    before = [(k, w.requires_grad, w.clone()) for k, w in model.named_parameters()]
    wb.check_backbone(model, inputs_for("DiT"))
    after = list(model.named_parameters())
    assert model.training and all(m.training for m in model.modules()) and len(before) == len(after)
    assert all(k == n and g == w.requires_grad and torch.equal(v, w) for (k, g, v), (n, w) in zip(before, after))


def test_what_is_patched_or_unknown_is_refused():
    model = tiny_dit()
    wb.patch(model)
    with pytest.raises(wb.BadInput, match="has dmp: expected a plain model"): wb.check_backbone(model, {})
    with pytest.raises(wb.BadInput, match="not a known backbone"): wb.check_backbone(torch.nn.Linear(2, 2), {})


def test_last_layers_of_zeros_are_said_to_hide_the_patch():
    model = BACKBONES["DiT"]()
    with torch.no_grad():
        for w in model.final_layer.parameters(): w.zero_()
    assert "are the last layers of this model zero?" in wb.check_backbone(model, inputs_for("DiT"))["action"].says
