"A patch trained on the conditions that a whole pipeline gives, sampled by `wb.sample` and by the pipeline itself."
import dataclasses

import pytest
import torch
from conftest import tiny_diffusers_dit
from diffusers import DiffusionPipeline, UNet2DModel
from PIL import Image
from pipelines import PROMPT_LENGTH
from trained_pipelines import CAPTIONS, data, experiment, length_of, TRAINED, WITHOUT_TEXT
from typer.testing import CliRunner

import dmp_wb as wb
from dmp_wb.cli import app
from dmp_wb.core.errors import BadInput
from dmp_wb.core.seeds import seed_of
from dmp_wb.core.settings import DataConfig
from dmp_wb.data.cache import write_cache
from dmp_wb.data.load import captions_of, load_data
from dmp_wb.data.sources import DATASETS, ImageData, SourceEntry
from dmp_wb.evaluation.draw import draw, image_shape
from dmp_wb.evaluation.effects import effects
from dmp_wb.evaluation.sample_effects import sample_effects
from dmp_wb.evaluation.sample_files import sample_run
from dmp_wb.look import compare, tables
from dmp_wb.look.compare import mse_by_timestep
from dmp_wb.look.denoise_explorer import DenoiseExplorer
from dmp_wb.look.gate_explorer import GateExplorer

@pytest.mark.parametrize("name", TRAINED)
def test_a_cache_holds_what_the_pipeline_gives(name, photos, folders, tmp_path):
    pipe, side = folders(name), TRAINED[name][1]
    cache = write_cache(data(photos, pipe, side), tmp_path / "cache", batch_size=4)
    assert len(cache) == len(CAPTIONS) and cache.pipeline == str(pipe)
    whole = DiffusionPipeline.from_pretrained(pipe)
    found = cache.batch(torch.arange(len(cache)))
    # in the loop the same is made of the same captions
    direct = load_data(data(photos, pipe, side))
    batch = direct.encode(direct.batch(torch.arange(len(cache))))
    assert set(batch) == set(found)
    for k in cache.null:
        assert torch.allclose(batch[k].float(), found[k].float(), atol=1e-5), k
        assert torch.allclose(direct.null[k].float(), cache.null[k].float(), atol=1e-5), k
    decoded = cache.decode(found["images"])
    assert decoded.shape == (len(cache), 3, side, side) and whole is not None


def kept(run): return dict(wb.get_patch(wb.load_model(run.folder, device="cpu")).state_dict())


@pytest.mark.parametrize("name", TRAINED)
def test_a_patch_trains_and_resumes(name, photos, folders, tmp_path):
    pipe, side = folders(name), TRAINED[name][1]
    write_cache(data(photos, pipe, side), tmp_path / "cache", batch_size=4)
    settings = experiment(name, pipe, tmp_path / "cache", "train.sample_every=2", "train.sample_images=2",
                          "train.sample_steps=2", "train.sample_guidance_scale=2")
    run = wb.train(wb.Experiment(), settings, folder=tmp_path / "whole")
    assert all(v == v for v in run.metrics()["loss"]) and (run.folder / "samples" / "step-0000004.png").is_file()
    whole = kept(run)
    assert any(v.abs().sum() > 0 for k, v in whole.items() if "prompts" in k)
    first = wb.train(wb.Experiment(), [*settings, "train.steps=2"], folder=tmp_path / "halves")
    again = wb.train(wb.Experiment(), settings, folder=first.folder)
    assert all(torch.equal(v, whole[k]) for k, v in kept(again).items())


def test_images_of_several_sizes_train_a_pipeline_that_is_not_told_the_size(photos, folders, tmp_path):
    name, sizes = "FluxPipeline", "data.size=[[16, 16], [8, 32]]"
    words = lambda name: [w for w in experiment(name, folders(name), photos, sizes, "data.caption_column=text",
                                                f"data.pipeline={folders(name)}") if not w.startswith("methods")]
    run = wb.train(wb.Experiment(), [*words(name), "methods.tlora.rank=2"], folder=tmp_path / "run")
    assert all(v == v for v in run.metrics()["loss"])
    with pytest.raises(BadInput, match=r"data.size has \[8, 32\], which the model, a FluxTransformer2DModel with dmp, "
                                       r"cannot be called with: the input has 16 tokens \(2 × 8\)"):
        wb.train(wb.Experiment(), [*words(name), "methods.dmp.num_prompts=2"], folder=tmp_path / "patch")
    with pytest.raises(BadInput, match="expected one size with pipeline .* whose model is told the size of its images"):
        wb.train(wb.Experiment(), words("StableDiffusionXLPipeline"), folder=tmp_path / "xl")


@pytest.mark.parametrize("name", TRAINED)
def test_sample_and_the_pipeline_draw_the_same(name, photos, folders, tmp_path):
    pipe, side = folders(name), TRAINED[name][1]
    source = data(photos, pipe, side)
    cache = write_cache(source, tmp_path / "cache", batch_size=4)
    settings = experiment(name, pipe, tmp_path / "cache", "optim.lr=0.05")
    run = wb.train(wb.Experiment(), settings, folder=tmp_path / "run")
    guidance = 1 if name in ("FluxPipeline", "QwenImagePipeline") else 3.0
    model = wb.load_model(run.folder, device="cpu")
    texts = captions_of(model, run.experiment.data, ["a cat", "two dogs"])
    assert texts is not None
    latents = wb.sample(model, 2, guidance_scale=guidance, texts=texts, scheduler=pipe, num_inference_steps=3,
                        quiet=True)
    ours = cache.decode(latents)

    whole = DiffusionPipeline.from_pretrained(pipe)
    whole.set_progress_bar_config(disable=True)
    backbone = whole.unet if hasattr(whole, "unet") else whole.transformer
    more = {"guidance_scale": guidance - 1 if name == "ZImagePipeline" else guidance} if guidance > 1 else {}
    if name not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        more["max_sequence_length"] = length_of(pipe)
    if "PixArt" in name or "Sana" in name: more["use_resolution_binning"] = False
    if name in ("WanPipeline", "CogVideoXPipeline"): more["num_frames"] = 1
    if name == "Lumina2Pipeline": more["cfg_normalization"] = False

    def drawn():
        draws = lambda: [torch.Generator().manual_seed(seed_of(0, "image", i)) for i in range(2)]
        streams, given = draws(), {}
        noise = torch.cat([torch.randn(1, *cache.shape, generator=g) for g in draws()])
        if name == "CogVideoXPipeline": given["latents"] = noise.transpose(1, 2)   # with frames before channels
        if name == "Lumina2Pipeline": given["latents"] = noise                     # takes every VAE for one of 8 × 8
        with torch.no_grad():
            made = whole(["a cat", "two dogs"], height=side, width=side, num_inference_steps=3, generator=streams,
                         output_type="pt", **more, **given)
        images = torch.as_tensor(made.frames[:, 0] if hasattr(made, "frames") else made.images)
        return images * 2 - 1
    plain = drawn()
    wb.load_patch(backbone, run.folder / "patch")
    theirs = drawn()
    assert torch.allclose(ours, theirs, atol=2e-4), (ours - theirs).abs().max()
    assert (theirs - plain).abs().max() > 1e-3


@pytest.fixture(scope="module")
def runs(photos, folders, tmp_path_factory):
    "A run of a pipeline, whose cache is beside it."
    made = {}

    def run(name):
        if name not in made:
            home, pipe = tmp_path_factory.mktemp("run"), folders(name)
            write_cache(data(photos, pipe, TRAINED[name][1]), home / "cache", batch_size=4)
            made[name] = wb.train(wb.Experiment(), experiment(name, pipe, home / "cache", "optim.lr=0.05"),
                                  folder=home / "run")
        return made[name]
    return run


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_is_sampled_measured_compared_and_explored(name, runs, tmp_path):
    run = runs(name)
    folder = sample_run(run.folder, 2, tmp_path / "samples", captions=["a cat", "two dogs"], num_inference_steps=2,
                        quiet=True, device="cpu")
    assert len(list(folder.glob("*.png"))) == 2
    with pytest.raises(BadInput, match="holds images of something else: scheduler"):
        sample_run(run.folder, 2, folder, captions=["a cat", "two dogs"], num_inference_steps=2, quiet=True,
                   device="cpu", scheduler=run.experiment.base)
    drawn = draw(run.folder, 2, num_inference_steps=2, quiet=True, backbone=wb.load_model(run.folder, device="cpu"))
    assert drawn.images.shape == (2, *image_shape(run.folder)) and drawn.images.isfinite().all()
    model = wb.load_model(run.folder, device="cpu")
    source = load_data(run.experiment.data)
    found = effects(model, source, intervals=2, num_images=2)
    assert found.whole.shape == (2, 2) and found.whole.abs().sum() > 0
    spans, mse = mse_by_timestep(model, run.experiment, source, num_images=2, intervals=2)
    assert len(spans) == 2 and mse.isfinite().all()
    beside = tables.open_compared([str(run.folder)])
    looked = compare.look_at(beside, 2, 2, num_inference_steps=1, device="cpu", resolution=4)
    assert len(beside.notes) == 1 and looked.mse and looked.needs and looked.panels and looked.drawn
    shown = DenoiseExplorer(run.folder)
    assert len(shown.asked.words) == 4 and shown.asked.guided
    shown.steps.value = 10
    assert shown.static().axes
    shown = GateExplorer(run.folder, captions=["a cat", "two dogs"])
    assert shown.asked.words == ["a cat", "two dogs"] and shown.look(500, 1) is not None


@pytest.mark.parametrize("name", TRAINED)
def test_routing_and_conditions_made_in_the_loop(name, photos, folders, tmp_path):
    pipe, side = folders(name), TRAINED[name][1]
    settings = [s for s in experiment(name, pipe, photos, f"data.size={side}", "data.caption_column=text",
                                      f"data.pipeline={pipe}", f"data.prompt_length={length_of(pipe)}",
                                      "data.conditional=false", "methods={dtr: {}}", "train.checkpoint_every=1")
                if "dmp" not in s]
    whole = wb.train(wb.Experiment(), [*settings, "train.steps=2"], folder=tmp_path / "whole")
    first = wb.train(wb.Experiment(), [*settings, "train.steps=1"], folder=tmp_path / "halves")
    again = wb.train(wb.Experiment(), [*settings, "train.steps=2"], folder=first.folder)
    one, two = (wb.load_model(run.folder, device="cpu").state_dict() for run in (whole, again))
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    before = wb.load_model(pipe, device="cpu").state_dict()
    assert any(not torch.equal(v, one[k]) for k, v in before.items())


def videos(frames):
    x = torch.randn(4, 3, frames, 4, 4, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.interpolate(x, size=(frames, 32, 32)).clamp(-1, 1)
    return ImageData(x, None, [], words=["a cat", "two dogs", "a red house", "the sea"])


def test_videos(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "moving", SourceEntry(lambda config: videos(5)))
    monkeypatch.setitem(DATASETS, "odd", SourceEntry(lambda config: videos(4)))
    pipe = folders("WanPipeline")
    config = DataConfig(name="moving", pipeline=str(pipe), prompt_length=PROMPT_LENGTH)
    with pytest.raises(BadInput, match="videos have 4 frames: expected one more than a multiple of 4 for VAE"):
        write_cache(dataclasses.replace(config, name="odd"), tmp_path / "odd")
    with pytest.raises(BadInput, match="videos have 5 frames, but VAE .* takes images"):
        write_cache(dataclasses.replace(config, pipeline=str(folders("StableDiffusion3Pipeline"))), tmp_path / "odd")
    cache = write_cache(config, tmp_path / "cache", batch_size=2)
    assert cache.shape == (4, 2, 4, 4)
    settings = experiment("WanPipeline", pipe, tmp_path / "cache", "train.sample_every=4", "train.sample_images=2",
                          "train.sample_steps=2")
    run = wb.train(wb.Experiment(), settings, folder=tmp_path / "run")
    # two grids beside each other would be 64 wide: five frames of 32
    assert Image.open(run.folder / "samples" / "step-0000004.png").size == (2 * 5 * 32, 32)
    model = wb.load_model(run.folder, device="cpu")
    assert wb.get_patch(model).config.input_size == [2, 4, 4]
    texts = captions_of(model, run.experiment.data, ["a cat"])
    ours = cache.decode(wb.sample(model, 1, guidance_scale=3, texts=texts, scheduler=pipe, num_inference_steps=2,
                                  quiet=True))
    whole = DiffusionPipeline.from_pretrained(pipe)
    wb.load_patch(whole.transformer, run.folder / "patch")
    theirs = whole("a cat", height=32, width=32, num_frames=5, num_inference_steps=2, guidance_scale=3,
                   output_type="pt", generator=torch.Generator().manual_seed(seed_of(0, "image", 0)),
                   max_sequence_length=PROMPT_LENGTH)
    assert torch.allclose(ours[0].movedim(0, 1), torch.as_tensor(theirs.frames[0]) * 2 - 1, atol=2e-4)
    with pytest.raises(BadInput, match="draws videos of 5 frames"):
        draw(run.folder, 1, num_inference_steps=1, quiet=True)
    with pytest.raises(BadInput, match="cannot be called with 4×2×4×4 latents .* input_size in its config"):
        wb.train(wb.Experiment(), [*settings, "methods.dmp.input_size=[3,4,4]"], folder=tmp_path / "other")


def test_the_command(photos, folders, tmp_path):
    told = CliRunner().invoke(app, ["latents", str(photos), str(tmp_path / "cache"), "--size", "16",
                                    "--caption-column", "text", "--pipeline", str(folders("FluxPipeline")),
                                    "--prompt-length", str(PROMPT_LENGTH), "--unconditional", "--cpu",
                                    "--num-workers", "0", "--dtype", "bfloat16"])
    assert told.exit_code == 0 and "6 images as 16×8×8 latents" in told.output, told.output
    cache = load_data(str(tmp_path / "cache"))
    assert cache.null.keys() == {"encoder_hidden_states", "pooled_projections"}


def test_effects_on_samples(runs):
    found = sample_effects(runs("FluxPipeline").folder, intervals=2, num_images=2, num_inference_steps=1, quiet=True,
                           backbone=wb.load_model(runs("FluxPipeline").folder, device="cpu"))
    assert len(found.spans) == 2


def unet():
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
                       norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                       up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4)


@pytest.mark.parametrize("name", [n for n in WITHOUT_TEXT if n != "DiT"])
def test_a_class_without_text(name, tmp_path):
    model = unet() if name == "UNet2DModel" else tiny_diffusers_dit()
    assert type(model).__name__ == name
    model.save_pretrained(tmp_path / "base")
    run = wb.train(wb.Experiment(), [
        f"base={tmp_path / 'base'}", "data.name=digits", f"data.conditional={name != 'UNet2DModel'}", "name=tried",
        "methods={dmp: {num_prompts: 4}}", "train.batch_size=4", "train.steps=2", "train.log_every=1",
        "train.cpu=true", "train.log_with=null", "data.num_workers=0"], folder=tmp_path / "run")
    folder = sample_run(run.folder, 2, tmp_path / "samples", num_inference_steps=2, quiet=True, device="cpu")
    assert len(list(folder.glob("*.png"))) == 2
    shown = DenoiseExplorer(run.folder)
    shown.steps.value = 10
    assert shown.static().axes and GateExplorer(run.folder).look(500, 1) is not None


def test_encoders_in_half_precision(photos, folders, tmp_path):
    pipe = folders("StableDiffusion3Pipeline")
    whole, half = (write_cache(data(photos, pipe, 16, prompt_dtype=dtype), tmp_path / dtype, batch_size=4)
                   for dtype in ("float32", "bfloat16"))
    assert next(half._load_text().parameters()).dtype == torch.bfloat16
    one, two = (cache.texts(["a cat"])["encoder_hidden_states"] for cache in (whole, half))
    assert two.dtype == torch.float32 and torch.allclose(one, two, atol=0.1) and not torch.equal(one, two)
    assert torch.equal(two[0], half.batch(torch.tensor([0]))["encoder_hidden_states"][0])
    with pytest.raises(BadInput, match="unknown data.prompt_dtype 'int8': known: bfloat16, float16"):
        data(photos, pipe, 16, prompt_dtype="int8").check()
