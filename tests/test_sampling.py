import pytest
import torch
from conftest import randomise, tiny_diffusers_dit, tiny_dit

import dmp_wb as wb
from dmp_wb.core import BadInput
from dmp_wb.sampling import balanced_labels, guided
from dmp_wb.objectives import PREDICTION_TYPES
from dmp_wb.schedules import SAMPLERS, noise_schedule

FAST = dict(num_inference_steps=4, quiet=True)


def predicted(name): return {"prediction_type": "flow_prediction"} if name == "flow-euler" else {}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("out_channels", [1, 2])
def test_image_i_is_the_same_in_any_batch(name, out_channels):
    model = tiny_dit(out_channels=out_channels)
    draw = lambda **kw: wb.sample(model, sampler=name, **{"seed": 5, **FAST, **predicted(name), **kw})
    whole = draw(num_images=7, batch_size=7)
    assert whole.shape == (7, 1, 8, 8) and whole.dtype == torch.float32 and whole.abs().max() <= 1 and whole.isfinite().all()
    assert torch.allclose(whole, draw(num_images=7, batch_size=3), atol=1e-4)
    assert torch.allclose(whole[4:], draw(class_labels=[4, 5, 6], first=4), atol=1e-4)
    assert torch.allclose(whole[4:], draw(num_images=3, first=4), atol=1e-4)      # the default labels go by the number of the image
    assert not torch.allclose(whole, draw(num_images=7, seed=6), atol=1e-2)
    assert (whole[0] - whole[1]).abs().max() > 1e-2


class Oracle(torch.nn.Module):
    "Knows the one image there is, and so the exact noise in any x_t."
    def __init__(self, image, learned=False, target="epsilon"):
        super().__init__()
        self.dummy = torch.nn.Parameter(torch.zeros(()))
        self.image, self.learned, self.target = image, learned, target
        self.bar = noise_schedule("linear").alphas_cumprod
        self.config = type("C", (dict,), {"__getattr__": dict.__getitem__})(sample_size=8, in_channels=1, out_channels=1 + learned, num_classes=None)
    def forward(self, x, timestep):
        if self.target == "flow_prediction": a, b = 1 - timestep / 1000, timestep / 1000
        else: a, b = self.bar[timestep].sqrt(), (1 - self.bar[timestep]).sqrt()
        a, b = a.view(-1, 1, 1, 1), b.view(-1, 1, 1, 1)
        eps = (x - a * self.image) / b
        out = {"epsilon": eps, "sample": self.image.expand_as(x), "v_prediction": a * eps - b * self.image, "flow_prediction": eps - self.image}[self.target]
        return type("Out", (), {"sample": torch.cat([out, torch.zeros_like(out)], 1) if self.learned else out})


wb.register_backbone(Oracle, wb.Anatomy(*[None] * 5))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name,target", [(n, p) for n in SAMPLERS for p in PREDICTION_TYPES if (n == "flow-euler") == (p == "flow_prediction")])
def test_a_perfect_model_is_sampled_perfectly(name, target, learned):
    image = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    drawn = wb.sample(Oracle(image, learned, target), 3, sampler=name, num_inference_steps=50, prediction_type=target, quiet=True)
    assert (drawn - image).abs().max() < 0.02


def test_guidance_is_the_papers_formula(inputs):
    model, (x, _, _) = tiny_dit(out_channels=2), inputs
    y, t = torch.tensor([1, 2, 3, 4]), torch.tensor(400)
    with torch.no_grad():
        cond, free = model(x, t, y).sample, model(x, t, torch.full((4,), 10)).sample
        got = guided(model, x, t, {"class_labels": y}, {"class_labels": torch.tensor(10)}, 2.5)
        assert torch.allclose(got[:, :1], free[:, :1] + 2.5 * (cond[:, :1] - free[:, :1]), atol=1e-5)
        assert torch.allclose(got[:, 1:], cond[:, 1:], atol=1e-6)
        assert torch.allclose(guided(model, x, t, {"class_labels": y}, {}, 1.0), cond, atol=1e-6)
        assert torch.allclose(guided(model, x, t, {"class_labels": y}, {"class_labels": torch.tensor(10)}, 0.0)[:, :1], free[:, :1], atol=1e-6)


def test_base_and_patched_start_from_the_same_noise():
    model = tiny_dit()
    before = wb.sample(model, 5, **FAST)
    p = wb.patch(model)
    assert torch.equal(wb.sample(model, 5, **FAST), before)
    randomise(p, 0.5)
    assert not torch.equal(wb.sample(model, 5, **FAST), before)
    wb.unpatch(model)
    assert torch.equal(wb.sample(model, 5, **FAST), before)


def test_unconditional_and_training_mode():
    model = tiny_dit(num_classes=None).train()
    assert wb.sample(model, 2, **FAST).shape == (2, 1, 8, 8) and model.training
    assert balanced_labels(5, None) is None and balanced_labels(5, 3).tolist() == [0, 1, 2, 0, 1]


def test_diffusers_backbone_samples_too():
    assert wb.sample(tiny_diffusers_dit(), 2, **FAST).isfinite().all()


@pytest.mark.parametrize("wrong,match", [
    (dict(guidance_scale=-0.5), "guidance_scale is -0.5: expected a number ≥ 0"), (dict(guidance_scale=float("nan")), "guidance_scale is nan"),
    (dict(class_labels=[0, 10]), "class label 10 is out of range: expected integers 0 to 9"), (dict(class_labels=[-1]), "class label -1"),
    (dict(class_labels=[0.5]), "expected integers"), (dict(class_labels=[0, 1], num_images=3), "2 class_labels for 3 images"),
    (dict(num_images=0), "num_images is 0"), (dict(batch_size=0), "batch_size is 0"), (dict(sampler="dpm"), "did you mean 'ddpm'"),
    (dict(num_inference_steps=1001), "num_inference_steps is 1001: expected 1 to 1000"), (dict(schedule="sine"), "unknown schedule 'sine'"),
])
def test_bad_input(wrong, match):
    model = tiny_dit().train()
    with pytest.raises(BadInput, match=match): wb.sample(model, **{"quiet": True, **wrong})
    assert model.training
    with pytest.raises(BadInput, match="unconditional"): wb.sample(tiny_dit(num_classes=None), class_labels=[1], quiet=True)
