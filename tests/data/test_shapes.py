"Images that are no squares: cropped, trained on, cached, drawn, measured and looked at."
import numpy as np
import pytest
import torch
from PIL import Image
from test_data import folder_config, models, no_hub, one_line, photos  # noqa: F401

import dmp_wb as wb
from dmp_wb.config import load_experiment
from dmp_wb.core.errors import BadInput
from dmp_wb.core.settings import DataConfig, ModelConfig
from dmp_wb.data.cache import LatentCache, write_cache
from dmp_wb.data.images import centre_crop
from dmp_wb.data.load import load_data

TINY = ["model.patch_size=4", "model.hidden_size=16", "model.num_layers=1", "model.num_attention_heads=2",
        "model.learn_sigma=false", "train.batch_size=4", "train.steps=2", "train.log_with=null",
        "train.checkpoint_every=1", "train.sample_every=2", "train.sample_images=4", "train.sample_steps=2"]


def plain_crop(image, height, width):
    "ADM's crop in its own words, for any shape."
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_crop_of_any_shape_has_the_pixels_of_resizing_everything(mode):
    rng = np.random.default_rng(len(mode))
    for _ in range(150):
        width, height, h, w = (int(n) for n in (*rng.integers(1, 200, 2), *rng.integers(1, 90, 2)))
        pixels = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
        image = Image.fromarray(pixels.squeeze(-1) if len(mode) == 1 else pixels, mode)
        assert centre_crop(image, (h, w)) == plain_crop(image, h, w), (image.size, h, w)


def test_two_sides_are_height_and_width_and_equal_ones_are_one(tmp_path):
    root = photos(tmp_path / "photos", 4)
    assert load_data(folder_config(root, size=[12, 8])).batch(torch.arange(2))["images"].shape == (2, 3, 12, 8)
    assert DataConfig(size=[8, 8]).check().size == DataConfig(size=(8,)).check().size == 8
    assert DataConfig(size=(12, 8)).check().size == [12, 8]
    for wrong in ([0, 8], [8, 8, 8], [], -1, [[8, 8], [0, 12]]):
        with pytest.raises(BadInput, match="data.size is .*: expected the side in pixels, or .height, width.") as e:
            DataConfig(size=wrong).check()
        assert one_line(e)
    with pytest.raises(BadInput, match="model.sample_size is .*: expected a side, or .height, width."):
        ModelConfig(name="DiT-S/2", sample_size=[1, 2, 3]).check()
    with pytest.raises(BadInput, match="model.sample_size is .*: expected two numbers of 1 to"):
        ModelConfig(name="DiT-S/2", sample_size=[0, 8]).check()


class Means(torch.nn.Module):
    def forward(self, images): return images.mean((2, 3))


def test_a_model_of_oblong_images_is_trained_resumed_patched_drawn_and_measured(tmp_path, runs_folder):
    data = [f"data.name={photos(tmp_path / 'photos', 8)}", "data.size=[12, 8]", "data.num_workers=0"]
    run = wb.train(wb.Experiment(), [*TINY, *data, "name=base"])
    assert run.experiment.data.size == run.experiment.model.sample_size == [12, 8]
    assert load_experiment(run.folder / "config.yaml").data.size == [12, 8]
    run = wb.train(wb.Experiment(), [*TINY, *data, "name=base", "train.steps=3"])
    patch = wb.train(wb.Experiment(), [*TINY[5:], *data, "name=patch", "base=base", "methods.dmp.num_prompts=2"])
    assert run.steps_done == 3 and patch.finished
    model = wb.load_model(patch.folder, device="cpu")
    drawn = wb.sample(model, class_labels=[0, 1, 0, 1], num_inference_steps=2, quiet=True)
    assert drawn.shape == (4, 3, 12, 8)
    folder = wb.sample_run(patch.folder, 4, tmp_path / "drawn", sampler="ddim", num_inference_steps=2, device="cpu",
                           quiet=True)
    assert {Image.open(f).size for f in folder.glob("*.png")} == {(8, 12)}
    measured = wb.evaluate(folder, str(tmp_path / "photos"), Means(), ["fid"], cache=False, quiet=True)
    assert measured["num_reference"] == 8 and np.isfinite(measured["fid"])


def test_a_cache_of_oblong_images_knows_both_sides(models, tmp_path):  # noqa: F811
    config = folder_config(photos(tmp_path / "photos", 3), size=[12, 8], vae=str(models / "vae"))
    cache = write_cache(config, tmp_path / "latents", 2)
    assert cache.shape == (4, 6, 4) and cache.facts["size"] == [12, 8]
    LatentCache(tmp_path / "latents").check(DataConfig(size=[12, 8]))
    with pytest.raises(BadInput, match="data.size is 8, but latent cache .* was made of 12 × 8 images"):
        cache.check(DataConfig(size=8))
    with pytest.raises(BadInput, match=r"data.size is \[12, 9\]: expected a multiple of 2 for VAE"):
        write_cache(folder_config(tmp_path / "photos", size=[12, 9], vae=str(models / "vae")), tmp_path / "other")
