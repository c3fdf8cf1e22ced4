"Four whole pipelines with tiny random components, and one call to make images with any of them."
import json
import string

import torch
from backbones import BACKBONES, INPUT_SIZE
from conftest import randomise
from diffusers import (AutoencoderKL, DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline,
                       PNDMScheduler,
                       StableDiffusion3Pipeline, StableDiffusionPipeline)
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config,
                          T5EncoderModel, T5TokenizerFast)

PROMPT_LENGTH = 16   # tokens, of CLIP and of T5
CLIP_WIDTH, T5_WIDTH = 32, 64   # what the backbones take


def seeded(make, seed=0):
    """What `make` builds, with PyTorch's own initialisation, the same at every call;
    the caller's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def autoencoder(latent_channels, **config):
    "Images are twice as wide and high as latents, and neither flat nor saturated."
    return seeded(lambda: AutoencoderKL(
        block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=latent_channels,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **config))


def clip_tokenizer(folder):
    "Letters, digits and three merges."
    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase + string.digits
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters), "ca", "cat</w>", "do"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\nd o\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=PROMPT_LENGTH)


def clip(cls, tokenizer, seed=0):
    return seeded(lambda: cls(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=CLIP_WIDTH, projection_dim=CLIP_WIDTH, intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=PROMPT_LENGTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)), seed)


def t5():
    "Encoder and tokenizer, whose pieces are the letters."
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in "▁" + string.ascii_lowercase)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=PROMPT_LENGTH)
    config = T5Config(vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                      feed_forward_proj="gated-gelu")
    return seeded(lambda: T5EncoderModel(config)), tokenizer


def dit_pipeline(folder):
    return DiTPipeline(transformer=BACKBONES["DiTTransformer2DModel"](), vae=autoencoder(4),
                       scheduler=DDIMScheduler(clip_sample=False))


def sd_pipeline(folder):
    tokenizer = clip_tokenizer(folder / "tokenizer")
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              steps_offset=1)
    return StableDiffusionPipeline(
        unet=randomise(BACKBONES["UNet2DConditionModel-SD15"](), 0.2), vae=autoencoder(4), scheduler=scheduler,
        tokenizer=tokenizer,
        text_encoder=clip(CLIPTextModel, tokenizer), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


def sd3_pipeline(folder):
    tokenizer, tokenizer_2 = (clip_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2"))
    text_encoder_3, tokenizer_3 = t5()   # without them, the pipeline runs but does not load from what it saved
    return StableDiffusion3Pipeline(
        transformer=BACKBONES["SD3Transformer2DModel"](), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                        use_post_quant_conv=False),
        tokenizer=tokenizer, text_encoder=clip(CLIPTextModelWithProjection, tokenizer), tokenizer_2=tokenizer_2,
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer_2, seed=1), tokenizer_3=tokenizer_3,
        text_encoder_3=text_encoder_3)


def flux_pipeline(folder):
    tokenizer = clip_tokenizer(folder / "tokenizer")
    text_encoder_2, tokenizer_2 = t5()
    return FluxPipeline(
        transformer=BACKBONES["FluxTransformer2DModel"](),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                        use_post_quant_conv=False),
        tokenizer=tokenizer, text_encoder=clip(CLIPTextModel, tokenizer), tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2)


PIPELINES = {"DiTPipeline": dit_pipeline, "StableDiffusionPipeline": sd_pipeline,
             "StableDiffusion3Pipeline": sd3_pipeline,
             "FluxPipeline": flux_pipeline}

TEXT = dict(prompt="a cat", height=16, width=16, output_type="pt")
FLUX_HEIGHT, FLUX_WIDTH = (2 * n for n in INPUT_SIZE["FluxTransformer2DModel"])
ARGUMENTS = {
    "DiTPipeline": dict(class_labels=[3], guidance_scale=4.0, output_type="np"),
    "StableDiffusionPipeline": dict(TEXT, negative_prompt="a dog", guidance_scale=7.5),
    "StableDiffusion3Pipeline": dict(TEXT, negative_prompt="a dog", guidance_scale=7.0,
                                     max_sequence_length=PROMPT_LENGTH),
    "FluxPipeline": dict(TEXT, height=FLUX_HEIGHT, width=FLUX_WIDTH, guidance_scale=3.5,
                         max_sequence_length=PROMPT_LENGTH),
}


def backbone_of(pipe): return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def generate(name, pipe, seed=0, steps=2, **kw):
    """Images [B, 3, H, W] in 0…1 and float32, the same for the same seed;
    `kw` are further arguments of the pipeline, or other values."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    images = pipe(**{**ARGUMENTS[name], "num_inference_steps": steps, "generator": generator, **kw}).images
    return images.float() if isinstance(images, torch.Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)
