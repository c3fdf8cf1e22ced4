"The classifier of clothes, the bases and the VAE on Fashion-MNIST that ship, and the patches for changed images."
import json
import os
from dataclasses import asdict

import pytest
import torch

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.core.paths import assets_folder
from dmp_wb.core.settings import DataConfig
from dmp_wb.data.encoders import load_vae, vae_folder
from dmp_wb.data.sources import FASHION_FOLDERS, digits, faded, fashion_mnist, has_idx, sheared, slanted_digits
from dmp_wb.evaluation.distances import frechet_distance
from dmp_wb.evaluation.draw import draw
from dmp_wb.evaluation.extractors import extract, load_extractor
from dmp_wb.evaluation.features import FashionClassifier, accuracy_of, fashion_classifier, train_fashion_classifier

needs_images = pytest.mark.skipif(not any(map(has_idx, FASHION_FOLDERS)), reason="Fashion-MNIST is not here")
# the norms of some weights after 30 steps of the recipe, measured when the shipped weights were trained
AFTER_30_STEPS = {"body.0.weight": 2.8763, "body.8.weight": 4.63842, "body.13.weight": 5.66479, "head.weight": 1.81954}


def test_the_extractor_gives_96_features_of_28_by_28_images_alone():
    network = load_extractor("fashion", "cpu")
    found = network(torch.zeros(3, 1, 28, 28))
    assert found["features"].shape == (3, 96) == (3, network.width) and found["logits"].shape == (3, 10)
    for shape in ((1, 8, 8), (3, 28, 28)):
        with pytest.raises(BadInput, match="expected 1 × 28 × 28 for the extractor fashion"): network.check(shape)
    with pytest.raises(BadInput, match="whose weights ship"): load_extractor("fashion:weights.safetensors")


@needs_images
def test_the_shipped_classifier_reads_the_test_split_as_its_config_says():
    test = fashion_mnist(DataConfig(name="fashion-mnist", split="test"))
    told = json.loads((assets_folder() / "fashion-classifier" / "config.json").read_text())["held_out_accuracy"]
    accuracy = accuracy_of(fashion_classifier(), test.images, test.labels)
    assert accuracy >= 0.92 and accuracy == pytest.approx(told, abs=3e-4)


@needs_images
def test_the_recipe_begins_as_it_did_when_the_shipped_classifier_was_trained():
    model, _ = train_fashion_classifier(stop_after=30)
    found = {name: float(p.detach().norm()) for name, p in model.named_parameters()}
    assert {name: found[name] for name in AFTER_30_STEPS} == pytest.approx(AFTER_30_STEPS, rel=2e-3)
    assert sum(p.numel() for p in FashionClassifier().parameters()) == 94_866


@needs_images
@pytest.mark.skipif(not os.environ.get("DMP_WB_RETRAIN"), reason="five minutes of a CPU core: set DMP_WB_RETRAIN=1")
def test_trained_again_it_reads_as_much():
    assert train_fashion_classifier()[1] == pytest.approx(0.9207, abs=0.005)


def test_the_fashion_base_draws_what_the_classifier_reads_as_asked():
    labels = torch.arange(40) % 10
    images = wb.sample(wb.load_model("fashion-base"), class_labels=labels, guidance_scale=1.5, sampler="dpmsolver++",
                       num_inference_steps=10, quiet=True)   # its schedule is known
    assert images.shape == (40, 1, 28, 28) and accuracy_of(fashion_classifier(), images, labels) > 0.7


def test_slanted_digits_lean_to_the_right():
    images, slanted = digits().images, slanted_digits().images
    column = torch.arange(8.0)
    def middle(x): return ((x + 1) * column).sum((1, 2, 3)) / (x + 1).sum((1, 2, 3))   # of what is drawn
    def lean(x): return middle(x[:, :, :4]) - middle(x[:, :, 4:])
    leaning = lean(slanted) - lean(images)
    assert float((leaning > 0).float().mean()) > 0.99 and 1 < float(leaning.mean()) < 1.8   # four rows of 0.4
    assert torch.allclose(sheared(images, 0.0), images, atol=1e-5)
    tall = torch.full((1, 1, 9, 5), -1.0)
    tall[..., 2] = 1   # a line in the middle leans as much where a side is longer
    assert sheared(tall, 0.5)[0, 0, 0].argmax() == 4 and sheared(tall, 0.5)[0, 0, 4].argmax() == 2


def test_the_shipped_patch_draws_slanted_digits():
    labels, real = torch.arange(200) % 10, extract("digits", slanted_digits().images)
    distance = {}
    for name in ("digits-base", "digits-slanted"):
        images = wb.sample(wb.load_model(name), class_labels=labels, sampler="dpmsolver++", num_inference_steps=15,
                           quiet=True)
        distance[name] = frechet_distance(extract("digits", images), real)
    assert distance["digits-slanted"] < distance["digits-base"] / 4
    gates = wb.get_patch(wb.load_model("digits-slanted")).gates([0, 999]).detach()
    assert float((gates[0] - gates[1]).abs().max()) > 0.3   # other prompts at other timesteps


def lower_to_upper(images): # how bright the lower half is, as a share of the upper
    light = (images + 1).mean((0, 1, 3))
    return float(light[14:].sum() / light[:14].sum())


def test_the_shipped_patch_draws_faded_clothes():
    base, patched = (draw(name, 40, guidance_scale=1.5, num_inference_steps=10, quiet=True)
                     for name in ("fashion-base", "fashion-faded"))
    assert patched.images.shape == (40, 1, 28, 28) and torch.equal(base.labels, patched.labels)
    assert lower_to_upper(patched.images) < lower_to_upper(base.images) - 0.3
    assert accuracy_of(fashion_classifier(), patched.images, patched.labels) > 0.5   # it never saw a faded one
    gates = wb.get_patch(wb.load_model("fashion-faded")).gates([0, 999]).detach()
    assert float((gates[0] - gates[1]).abs().sum(-1).min()) > 0.1   # at work
    assert float(gates.max()) < 0.6                                 # and not collapsed


@pytest.mark.parametrize("name", ("digits-slanted", "fashion-faded", "fashion-latent-faded"))
def test_a_shipped_patch_is_what_its_experiment_trains(name):
    run, recipe = wb.open_run(name), wb.load_experiment(name)
    told, asked = asdict(run.experiment), asdict(recipe)
    for settings in (told, asked):
        del settings["model"]   # that of the base
        # what a run decides itself, and what leaves its weights as they are
        for key in ("batch_format", "checkpoint_every", "keep_every"): del settings["train"][key]
    assert told == asked
    assert run.summary["steps"] == recipe.train.steps == max(run.metrics()["step"])
    patch = wb.get_patch(wb.load_model(name))
    assert run.summary["trained_parameters"] == sum(p.numel() for p in patch.parameters())


def test_the_shipped_patch_of_clothes_is_small():
    folder = assets_folder() / "fashion-faded"
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 200_000


@needs_images
def test_the_shipped_vae_reconstructs_the_test_split_as_its_report_says():
    told = json.loads((assets_folder() / "fashion-vae" / "report.json").read_text())
    images, coder = fashion_mnist(DataConfig(name="fashion-mnist", split="test")).images, load_vae("fashion-vae")
    assert coder.latent_shape((1, 28, 28)) == (4, 7, 7)
    assert sum(p.numel() for p in coder.vae.parameters()) == told["parameters"]
    with torch.no_grad():
        means = torch.cat([coder.moments(part).chunk(2, 1)[0] for part in images[:2000].split(500)])
        again = torch.cat([coder.decode(coder.scale * (part - coder.shift)) for part in means.split(500)])
    # of the first fifth, in half precision; told of all, before they were rounded to it
    assert float((again - images[:2000]).square().mean()) == pytest.approx(told["test_mse"], rel=0.03)
    assert float(coder.scale * means.std()) == pytest.approx(1, abs=0.01)


def test_a_shipped_vae_is_known_by_name_and_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    assert vae_folder("fashion-vae") == str(assets_folder() / "fashion-vae")
    assert vae_folder("stabilityai/sd-vae-ft-ema") == "stabilityai/sd-vae-ft-ema"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fashion-vae").mkdir()
    assert vae_folder("fashion-vae") == "fashion-vae"


def test_the_models_on_latents_that_ship_draw_what_their_page_says():
    folders = [assets_folder() / name for name in ("fashion-vae", "fashion-latent-base", "fashion-latent-faded")]
    assert sum(file.stat().st_size for folder in folders for file in folder.rglob("*")) <= 2_000_000
    base, patched = (draw(folder.name, 40, num_inference_steps=10, quiet=True) for folder in folders[1:])
    assert base.images.shape == (40, 1, 28, 28)
    assert accuracy_of(fashion_classifier(), base.images, base.labels) > 0.6
    assert lower_to_upper(patched.images) < lower_to_upper(base.images) - 0.15
    assert wb.load_model("fashion-latent-base").trained_as.latents   # so that `sample` does not cut them off


def test_faded_images_keep_their_first_row_and_a_tenth_of_the_last():
    images = torch.tensor([[[[1.0], [1.0], [-1.0], [1.0]]]])
    assert torch.allclose(faded(images).flatten(), torch.tensor([1.0, 0.4, -1.0, -0.8]), atol=1e-6)
