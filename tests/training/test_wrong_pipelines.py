"What does not fit a pipeline is told in one line that names both sides, before anything is written."
import json
import shutil

import pytest
from pipelines import autoencoder
from trained_pipelines import data, experiment, TRAINED

import dmp_wb as wb
from dmp_wb.core.errors import BadInput
from dmp_wb.core.settings import DataConfig
from dmp_wb.data.cache import write_cache
from dmp_wb.data.load import captions_of, load_data
from dmp_wb.data.prompts import caption_bytes, captions_in

SD3, FLUX, WAN = "StableDiffusion3Pipeline", "FluxPipeline", "WanPipeline"


def told(do, *parts):
    with pytest.raises(BadInput) as error: do()
    text = str(error.value)
    assert "\n" not in text and len(text) < 900
    for part in parts: assert part in text, text


def direct(photos, pipe, name, *more):
    side = TRAINED[name][1]
    return experiment(name, pipe, photos, f"data.size={side}", "data.caption_column=text", f"data.pipeline={pipe}",
                      "data.prompt_length=16", "data.conditional=false", *more)


def test_a_prompt_that_is_too_long(photos, folders, tmp_path):
    source = load_data(data(photos, folders(SD3), 16))
    told(lambda: source.texts(["word " * 40]), "caption 'word word", "tokens: expected at most 16",
         "pipeline", "prompt_length")


def test_a_prompt_that_is_too_long_is_told_before_a_cache_is_begun(photos, folders, tmp_path):
    root = shutil.copytree(photos, tmp_path / "photos")
    shutil.copy(next(root.rglob("*.png")), root / "zz.png")
    with open(root / "metadata.csv", "a") as lines: lines.write(f"zz.png,{'word ' * 40}\n")
    told(lambda: write_cache(data(root, folders(SD3), 16), tmp_path / "cache"), "caption 'word word", "at most 16")
    assert not (tmp_path / "cache").exists()


def test_a_pipeline_without_a_vae(photos, folders, tmp_path):
    shutil.copytree(folders(SD3), tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "vae")
    config = data(photos, tmp_path / "pipe", 16)
    said = f"data.pipeline is '{tmp_path / 'pipe'}'", "a pipeline with one"
    told(lambda: load_data(config), *said)
    told(lambda: write_cache(config, tmp_path / "cache"), *said)


def test_an_encoder_gives_what_the_backbone_does_not_take(photos, folders, tmp_path):
    xl, sd3 = folders("StableDiffusionXLPipeline"), folders(SD3)
    run = lambda: wb.train(wb.Experiment(), direct(photos, xl, SD3, f"base={sd3}"), folder=tmp_path / "run")
    told(run, "16×", "4×8×8", str(sd3))   # of other channels
    shutil.copytree(xl, tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / "vae")
    shutil.copytree(sd3 / "vae", tmp_path / "pipe" / "vae")
    settings = direct(photos, tmp_path / "pipe", SD3, f"base={sd3}")
    run = lambda: wb.train(wb.Experiment(), settings, folder=tmp_path / "run")
    told(run, "gives added_cond_kwargs.", "SD3Transformer2DModel", "pooled_projections")
    assert not (tmp_path / "run").exists()


def test_widths_that_differ(photos, folders, tmp_path):
    flux, sd3 = folders(FLUX), folders(SD3)
    run = lambda: wb.train(wb.Experiment(), direct(photos, sd3, FLUX, f"base={flux}"), folder=tmp_path / "run")
    told(run, "FluxTransformer2DModel", "cannot be called with 16×8×8 latents", "pooled_projections [64]", str(sd3))


def test_sizes_that_do_not_fit(photos, folders, tmp_path):
    sd3, wan, flux = folders(SD3), folders(WAN), folders(FLUX)
    told(lambda: write_cache(data(photos, sd3, 17), tmp_path / "cache"), "data.size is 17", "multiple of 2", str(sd3))
    told(lambda: wb.train(wb.Experiment(), direct(photos, wan, WAN, "data.size=24"), folder=tmp_path / "run"),
         "4×1×3×3", "multiples of (1, 2, 2)")
    told(lambda: wb.train(wb.Experiment(), direct(photos, wan, WAN, "methods.dmp.input_size=[3,4,4]"),
                          folder=tmp_path / "run"), "4×1×4×4")
    told(lambda: wb.train(wb.Experiment(), direct(photos, flux, FLUX, "methods.dmp.input_size=[8,12]"),
                          folder=tmp_path / "run"), "16×8×8")


def test_another_objective(photos, folders, tmp_path):
    run = lambda: wb.train(wb.Experiment(), direct(photos, folders(SD3), SD3, "objective.prediction_type=epsilon"),
                           folder=tmp_path / "run")
    told(run, "objective.prediction_type is epsilon: expected flow_prediction", "SD3Transformer2DModel")


def test_what_is_no_pipeline(photos, folders, tmp_path):
    given = dict(name=str(photos), size=16)
    config = lambda name, **more: DataConfig(**given, caption_column="text", pipeline=str(name), **more)
    told(lambda: load_data(config(tmp_path)), "data.pipeline", "expected the folder of a diffusers pipeline")
    told(lambda: load_data(config(folders(SD3), vae="fashion-vae")), "data.pipeline", "data.vae",
         "expected one of them")
    told(lambda: load_data(DataConfig(**given, pipeline=str(folders(SD3)))), "no captions", "data.caption_column")
    index = json.loads((folders(SD3) / "model_index.json").read_text())
    for changed, parts in (({"_class_name": "StableDiffusion4Pipeline"}, ("Diffusion4Pipeline", "nearest relative")),
                           ({"text_encoder": ["os", "system"]}, ("text_encoder", "diffusers or transformers")),
                           ({"_class_name": ["mine", "Pipe"]}, ("names no class",))):
        broken = tmp_path / f"broken-{list(changed.values())[0]}"
        broken.mkdir()
        (broken / "vae").symlink_to(folders(SD3) / "vae")
        (broken / "model_index.json").write_text(json.dumps(index | changed))
        told(lambda name=broken: load_data(config(name)), *parts)


def test_a_scheduler_that_is_not_there(photos, folders, tmp_path):
    model = wb.load_model(folders(SD3))
    (pipe := tmp_path / "pipe").mkdir()
    draw = lambda: wb.sample(model, 1, scheduler=pipe, num_inference_steps=1, quiet=True,
                             texts=captions_of(model, load_data(data(photos, folders(SD3), 16))))
    told(draw, f"scheduler is '{pipe}'", "expected the folder of a diffusers pipeline")
    shutil.copy(folders(SD3) / "model_index.json", pipe)
    told(draw, f"scheduler is '{pipe}', which has none that can be loaded")


def test_a_cache_of_another_pipeline(photos, folders, tmp_path):
    write_cache(data(photos, folders(SD3), 16), tmp_path / "cache")
    shutil.copytree(folders(SD3), tmp_path / "pipe")
    other = autoencoder(16, scaling_factor=2.0, shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False)
    other.save_pretrained(tmp_path / "pipe" / "vae")
    told(lambda: load_data(DataConfig(name=str(tmp_path / "cache"), pipeline=str(tmp_path / "pipe"))), "another VAE",
         "data.pipeline")
    told(lambda: write_cache(data(photos, folders(FLUX), 16), tmp_path / "cache"), "latents of something else")
    told(lambda: load_data(DataConfig(name=str(tmp_path / "cache"), prompt_length=8)), "made with prompts of 16 tokens",
         "data.prompt_length is 8")


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_3", "text_encoder_2"])
def test_a_part_that_is_named_and_is_not_there(part, photos, folders, tmp_path):
    shutil.copytree(folders(SD3), tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe" / part)
    told(lambda: write_cache(data(photos, tmp_path / "pipe", 16), tmp_path / "cache"), str(tmp_path / "pipe"),
         f"names a {part}: expected a folder {part}")
    assert not (tmp_path / "cache").exists()


def test_an_encoder_that_fails(photos, folders, monkeypatch):
    source = load_data(data(photos, folders(SD3), 16))

    def failing(**given): raise RuntimeError("index 99 is out of bounds")
    monkeypatch.setattr(source.text.pipe, "encode_prompt", failing)
    monkeypatch.setattr(source.text, "arguments", {})
    told(lambda: source.text._encode(["a cat"], False), "encode_prompt of pipeline", "no prompt of 16 tokens",
         "index 99 is out of bounds; set data.prompt_length")


def test_what_is_sampled(photos, folders):
    model, source = wb.load_model(folders(SD3), device="cpu"), load_data(data(photos, folders(SD3), 16))
    draw = lambda words=("a cat",), **more: wb.sample(
        model, 1, prediction_type="flow_prediction", sampler="flow-euler", num_inference_steps=1, quiet=True,
        **{"texts": captions_of(model, source, words), **more})
    told(lambda: draw(texts=None), "SD3Transformer2DModel, is conditioned on text", "expected texts")
    told(lambda: draw(size=(1, 8, 8)), "input_size is (1, 8, 8)", "SD3Transformer2DModel", "expected 2 sides")
    told(lambda: draw(size=(7, 8)), "input_size is (7, 8)", "multiples of (2, 2)")
    told(lambda: draw(words=[None]), "captions hold None: expected texts")
    told(lambda: draw(words="a cat"), "captions are 'a cat': expected a list")
    told(lambda: draw(scheduler=folders("StableDiffusionXLPipeline")), "EulerDiscreteScheduler for epsilon",
         "the model gives flow_prediction")


def test_captions_of_any_signs():
    assert captions_in(caption_bytes(["", "a\0b", "ü🎉\n", " "])) == ["", "ab", "ü🎉\n", " "]
