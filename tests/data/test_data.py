import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, PixArtSigmaPipeline, StableDiffusionPipeline
from PIL import Image, ImageOps
from pipelines import PROMPT_LENGTH, autoencoder, clip, clip_tokenizer, t5
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dmp_wb.core import files as core_files
from dmp_wb.data import cache as data_cache, cache_facts
from dmp_wb.data import sources
from dmp_wb.models import anatomy
from conftest import tiny_diffusers_dit
from dmp_wb.core.errors import BadInput, MissingFile
from dmp_wb.core.settings import DataConfig
from dmp_wb.data.cache import LatentCache, write_cache
from dmp_wb.data.encoders import draw_latents, EncodedImages, LatentCoder, load_text_encoder, load_vae
from dmp_wb.data.folders import image_folder, ImageFiles, SkippedImages
from dmp_wb.data.images import BadImage, centre_crop, read_image, to_tensor
from dmp_wb.data.load import load_data
from dmp_wb.data.sources import digits, EpochOrder, ImageData
from dmp_wb.data.tables import hub_data, load_images
from dmp_wb.methods.weights import fingerprint

SCALE, SHIFT = 0.3611, 0.1159
datasets.disable_progress_bars()


# --- helpers

def noise_image(seed, width=20, height=24, mode="RGB"):
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photos(folder, number=7, classes=("cat", "dog"), bad=()):
    "`number` noise images in class folders, in the order of the list; those in `bad` hold no image."
    for i in range(number):
        file = folder / (classes[i * len(classes) // number] if classes else ".") / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if i in bad: file.write_bytes(b"no image")
        else: noise_image(i).save(file)
    return folder


def folder_config(folder, **changes): return DataConfig(**{**dict(name=str(folder), size=8, num_workers=0), **changes})


def quiet(line): pass


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if not p.name.startswith(".")}


def equal(a, b):
    return a.keys() == b.keys() and all(a[k] == b[k] if isinstance(a[k], list) else torch.equal(a[k], b[k]) for k in a)


def one_line(error): return "\n" not in str(error.value) and "Traceback" not in str(error.value)


def saved(tmp_path, columns, features=None, name="saved"):
    "A folder that `save_to_disk` wrote; PIL images under `image`."
    features = {"image": datasets.Image(), **(features or {})}
    ds = datasets.Dataset.from_dict(columns)
    for column, feature in features.items(): ds = ds.cast_column(column, feature)
    ds.save_to_disk(tmp_path / name)
    return str(tmp_path / name)


class Killed(Exception): pass


@pytest.fixture(autouse=True)
def no_hub(tmp_path, monkeypatch):
    "No network, and caches of their own."
    for module in (huggingface_hub.constants, datasets.config): monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Folders of two VAEs, and of pipelines with text encoders."
    root = tmp_path_factory.mktemp("models")
    vae = autoencoder(4, scaling_factor=SCALE, shift_factor=SHIFT)
    vae.save_pretrained(root / "vae")
    vae.save_pretrained(root / "pipeline" / "vae")
    with torch.no_grad(): next(vae.parameters()).view(-1)[0] += 0.1
    vae.save_pretrained(root / "other" / "vae")
    tokenizer = clip_tokenizer(root / "letters")
    for name, cls, seed in (("clip", CLIPTextModel, 0), ("clip-2", CLIPTextModel, 1),
                            ("clip-projection", CLIPTextModelWithProjection, 0)):
        tokenizer.save_pretrained(root / name / "tokenizer")
        clip(cls, tokenizer, seed).save_pretrained(root / name / "text_encoder")
    encoder, tokenizer = t5()
    tokenizer.save_pretrained(root / "t5" / "tokenizer")
    encoder.save_pretrained(root / "t5" / "text_encoder")
    return root


# --- one file: what becomes of it

y, x = np.mgrid[:24, :20]
# red grows to the right, green downwards
PICTURE = np.stack([x * 10 + 30, y * 8 + 40, 120 + 0 * x], -1).astype(np.uint8)
RGB = Image.fromarray(PICTURE)
GREY = RGB.convert("L")


def like(expected, tolerance=0):
    expected = np.asarray(expected.convert("RGB") if isinstance(expected, Image.Image) else expected).astype(int)
    def check(image):
        assert (image.mode == "RGB" and (np.asarray(image).shape == expected.shape)
                and np.abs(np.asarray(image).astype(int) - expected).max() <= tolerance)
    return check


def grey(values): return np.repeat(np.asarray(values)[:, :, None], 3, 2)


def palette_with_hole():
    image = Image.new("P", (4, 3), 0)
    image.putpalette([200, 10, 10, 0, 0, 255])
    image.putpixel((1, 2), 1)
    return encoded(image, "PNG", transparency=1)


def rgba():
    alpha = np.full((24, 20), 255, np.uint8)
    alpha[:, :5], alpha[:, 5:10] = 0, 51
    return Image.fromarray(np.dstack([PICTURE, alpha]))


def on_white(rgba):
    values = np.asarray(rgba).astype(float)
    return (values[..., 3:] * values[..., :3] + (255 - values[..., 3:]) * 255) / 255


def on_its_side():
    exif = Image.Exif()
    exif[0x0112] = 6     # to be turned by 90° clockwise
    return encoded(RGB.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=100, subsampling=0)


def jpeg_with_bytes_flipped(*places):
    data = bytearray(encoded(RGB, "JPEG"))
    for i in places: data[i] ^= 0xff
    return bytes(data)


SIXTEEN = (np.arange(480).reshape(24, 20) * 136).astype(np.uint16)
DAMAGED = "is damaged or cut off: "
FILES = {   # name: (what it holds, what it becomes, or the message, or the message's beginning with an … at its end)
    "rgb.png": (encoded(RGB, "PNG"), like(RGB)),
    "grey.png": (encoded(GREY, "PNG"), like(GREY)),
    "grey-alpha.png": (
        encoded(Image.fromarray(np.dstack([np.full((4, 4), 10, np.uint8), np.full((4, 4), 0, np.uint8)])), "PNG"),
        like(np.full((4, 4, 3), 255))),
    "cmyk.jpg": (encoded(RGB.convert("CMYK"), "JPEG", quality=100), like(RGB, 8)),
    "palette.png": (encoded(RGB.quantize(16), "PNG"), like(RGB.quantize(16))),
    "palette-transparent.png": (palette_with_hole(), like(
        np.array([[[200, 10, 10]] * 4] * 2 + [[[200, 10, 10], [255] * 3, [200, 10, 10], [200, 10, 10]]]))),
    "rgba.png": (encoded(rgba(), "PNG"), like(on_white(rgba()), 1)),
    "rgb-one-colour-transparent.png": (encoded(Image.new("RGB", (3, 3), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
                                       like(np.full((3, 3, 3), 255))),
    "16-bit.png": (encoded(Image.fromarray(SIXTEEN), "PNG"), like(grey((SIXTEEN / 257).round()))),
    "16-bit.tif": (encoded(Image.fromarray(SIXTEEN), "TIFF"), like(grey((SIXTEEN / 257).round()))),
    "16-bit.pgm": (b"P5 20 24 65535\n" + SIXTEEN.byteswap().tobytes(), like(grey((SIXTEEN / 257).round()))),
    "1-bit.png": (encoded(Image.fromarray(x > 9), "PNG"), like(grey(255 * (x > 9)))),
    "animated.gif": (encoded(GREY, "GIF", save_all=True, append_images=[ImageOps.invert(GREY)]), like(GREY)),
    "animated.webp": (encoded(RGB, "WEBP", save_all=True, append_images=[ImageOps.invert(RGB)], lossless=True),
                      like(RGB)),
    "two-pages.tif": (encoded(RGB, "TIFF", save_all=True, append_images=[ImageOps.invert(RGB)]), like(RGB)),
    "on-its-side.jpg": (on_its_side(), like(RGB, 6)),
    "really-a-jpeg.png": (encoded(RGB, "JPEG", quality=100, subsampling=0), like(RGB, 6)),
    "lab.tif": (encoded(Image.new("LAB", (5, 4), (255, 128, 128)), "TIFF"), like(np.full((4, 5, 3), 255), 1)),
    "one-pixel.bmp": (encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "BMP"), like(np.array([[[9, 8, 7]]]))),
    "bad-exif.jpg": (encoded(RGB, "JPEG", quality=100, subsampling=0, exif=b"Exif\0\0no tiff"), like(RGB, 6)),
    # whole pixels, and an orientation that nobody can know
    "bad-exif.png": (encoded(RGB, "PNG", exif=b"no tiff"), like(RGB)),
    "float.tif": (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
                  "has float pixels, whose range is not known: expected 8 or 16 bits a channel"),
    "empty.png": (b"", "is empty (0 bytes)"),
    "text.png": (b"This is a text.\n", "is no image that Pillow can read"),
    "cut.png": (encoded(noise_image(0), "PNG")[:900], DAMAGED + "…"),
    "cut-in-header.png": (encoded(RGB, "PNG")[:20], DAMAGED + "…"),
    "cut.jpg": (encoded(noise_image(0), "JPEG")[:700], DAMAGED + "image file is truncated…"),
    "cut.gif": (encoded(noise_image(0), "GIF")[:850], DAMAGED + "…"),
    "first-bytes-flipped.jpg": (jpeg_with_bytes_flipped(0, 1), "is no image that Pillow can read"),
    "tables-flipped.jpg": (jpeg_with_bytes_flipped(20, 21, 22, 23), "is no image that Pillow can read"),
    "sampling-flipped.jpg": (jpeg_with_bytes_flipped(encoded(RGB, "JPEG").index(b"\xff\xc0") + 11),
                             DAMAGED + "broken data stream when reading image file"),
}


def outcome(message, expected):
    return (message.startswith(expected[:-1]) and len(message) > len(expected) if expected.endswith("…")
            else message == expected)


def test_the_digits_are_those_of_scikit_learn(monkeypatch):
    from sklearn.datasets import load_digits
    raw, quick = load_digits(), digits()
    assert np.array_equal((quick.images[:, 0].numpy() + 1) * 8, raw.images) and quick.images.dtype == torch.float32
    assert np.array_equal(quick.labels, raw.target) and quick.class_names == [str(n) for n in raw.target_names]
    # a version that keeps them elsewhere
    monkeypatch.setattr(sources.importlib.util, "find_spec", {"sklearn": None}.get)
    assert torch.equal(digits().images, quick.images) and torch.equal(digits().labels, quick.labels)


@pytest.mark.parametrize("name", FILES)
def test_what_becomes_of_a_file(name, tmp_path):
    data, expected = FILES[name]
    root = photos(tmp_path / "photos", 2, ("cat",))
    file = root / "cat" / f"01-{name}"
    file.write_bytes(data)
    files, said = image_folder(folder_config(root)), []
    skipped = SkippedImages(1, said.append)
    assert len(files) == 3
    batch = skipped.take(files.batch(torch.tensor([1])))
    if callable(expected):
        for source in (file, str(file), data): expected(read_image(source))
        assert read_image(file, 1).mode == "L" and not said and torch.equal(batch["images"][0],
                                                                            to_tensor(centre_crop(read_image(data), 8)))
    else:
        for source in (file, data):
            with pytest.raises(BadImage) as error: read_image(source)
            assert outcome(str(error.value), expected) and one_line(error), str(error.value)
        assert said == [f"skipped image 1: cat/01-{name} {skipped.found[f'cat/01-{name}']}"] and outcome(
            skipped.found[f"cat/01-{name}"], expected)
        assert torch.equal(batch["images"][0], files.image(2))   # the next in the list
        skipped.take(files.batch(torch.tensor([1, 2])))
        assert len(said) == 1                                    # named once


@pytest.mark.parametrize("name", FILES)
def test_what_becomes_of_a_file_in_grey(name):
    data, expected = FILES[name]
    if callable(expected):
        image = read_image(data, 1)
        assert (image.mode == "L"
                and np.abs(np.asarray(image).astype(int) - np.asarray(read_image(data).convert("L"))).max() <= 1)
    else:
        with pytest.raises(BadImage): read_image(data, 1)


def test_transparent_16_bit_grey_lies_on_white():
    values = np.full((4, 4), 300, np.uint16)
    values[0, 0] = 65535 // 2
    image = np.asarray(read_image(encoded(Image.fromarray(values), "PNG", transparency=300)))
    assert image[0, 0].tolist() == [127] * 3 and image[3, 3].tolist() == [255] * 3


@pytest.mark.parametrize("format,mode", [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "P"), ("GIF", "P"), ("TIFF", "RGB"),
                                         ("TIFF", "I;16"), ("WEBP", "RGB"), ("BMP", "P")])
def test_a_flipped_byte_is_read_or_a_bad_image(format, mode, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    data = encoded(Image.fromarray(SIXTEEN) if mode == "I;16" else RGB.convert(mode), format)
    counts = {"read": 0, "bad": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in [*range(min(len(data), 250)), *range(250, len(data), 37)]:
            try:
                assert read_image(data[:i] + bytes([data[i] ^ 0xff]) + data[i + 1:]).mode == "RGB"
                counts["read"] += 1
            except BadImage: counts["bad"] += 1
    assert counts["bad"] >= 4, counts


def test_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    for side in (15, 40):   # Pillow warns, and refuses from twice as many
        with pytest.raises(BadImage, match="^has too many pixels: expected at most 200$"):
            read_image(encoded(Image.new("RGB", (side, side)), "PNG"))
    assert read_image(encoded(Image.new("RGB", (10, 20)), "PNG")).size == (10, 20)


def test_files_that_are_not_there(tmp_path):
    root = photos(tmp_path / "photos", 4, ("cat", "dog"))
    (root / "cat" / "01-link.png").symlink_to(tmp_path / "nowhere.png")
    files, said = image_folder(folder_config(root)), []
    (root / "dog" / "02.png").unlink()
    take = SkippedImages(2, said.append).take
    batch = take(files.batch(torch.tensor([1, 3])))
    assert said == ["skipped image 1: cat/01-link.png does not exist", "skipped image 2: dog/02.png does not exist"]
    assert (torch.equal(batch["images"], torch.stack([files.image(2), files.image(4)]))
            and batch["class_labels"].tolist() == [0, 1])
    with pytest.raises(BadImage, match="^does not exist$"): files.image(1)


def test_a_folder_with_an_image_name_is_a_folder(tmp_path):
    root = photos(tmp_path / "photos", 2, ("cat", "x.png"))
    files = image_folder(folder_config(root))
    assert ([files.names(i) for i in range(2)] == ["cat/00.png", "x.png/01.png"]
            and files.class_names == ["cat", "x.png"])
    with pytest.raises(BadImage): read_image(root / "x.png")


def test_the_limit_of_bad_images(tmp_path):
    root = photos(tmp_path / "photos", 6, ("cat",), bad=(0, 2, 4))
    files, said = image_folder(folder_config(root)), []
    skipped = SkippedImages(2, said.append)
    skipped.take(files.batch(torch.tensor([0, 1, 2, 3])))
    with pytest.raises(BadInput, match="^3 images cannot be read, more than data.max_bad_images, 2; the first, "
                       "cat/00.png, is no image that Pillow can read$"):
        skipped.take(files.batch(torch.tensor([4])))
    assert len(said) == 3 and len(skipped.found) == 3
    with pytest.raises(BadInput, match="^1 images cannot be read"):
        SkippedImages(0, quiet).take(image_folder(folder_config(root)).batch(torch.tensor([0])))
    assert "bad_images" not in SkippedImages(3, quiet).take(image_folder(folder_config(root)).batch(torch.arange(6)))


def test_no_image_can_be_read(tmp_path):
    files = image_folder(folder_config(photos(tmp_path / "photos", 3, ("cat",), bad=range(3))))
    for _ in range(2):
        with pytest.raises(BadInput, match="^none of the 3 images can be read; the first, cat/00.png, is no image that "
                           "Pillow can read$"):
            files.batch(torch.tensor([1, 0]))


def test_the_last_image_is_replaced_by_the_first(tmp_path):
    files = image_folder(folder_config(photos(tmp_path / "photos", 3, ("cat",), bad=(1, 2))))
    assert torch.equal(files.batch(torch.tensor([2]))["images"][0], files.image(0))


# --- the crop

def resample(values, length, kernel, support):
    """Pillow's resampling along the first axis, in float64:
    the kernel is as wide as an output pixel, and cut at the borders."""
    ratio = len(values) / length
    width, out = max(ratio, 1.0), []
    for i in range(length):
        centre = (i + 0.5) * ratio
        places = np.arange(max(0, int(centre - support * width + 0.5)),
                           min(len(values), int(centre + support * width + 0.5)))
        weights = np.array([kernel((p + 0.5 - centre) / width) for p in places])
        out.append(np.tensordot(weights / weights.sum(), values[places], 1))
    return np.floor(np.stack(out) + 0.5).clip(0, 255)


def cubic(t, a=-0.5):
    t = abs(t)
    return ((a + 2) * t - (a + 3)) * t * t + 1 if t < 1 else (((t - 5) * t + 8) * t - 4) * a if t < 2 else 0.0


def box(t): return float(-0.5 < t <= 0.5)


def resized(array, height, width, kernel, support, upright):
    if upright: return resized(array.transpose(1, 0, 2), width, height, kernel, support, False).transpose(1, 0, 2)
    return resample(resample(array.transpose(1, 0, 2), width, kernel, support).transpose(1, 0, 2), height, kernel,
                    support)


def reference_crop(array, size, orders=(False, False)):
    """ADM's crop in NumPy: halve by boxes while both sides keep `size`, then bicubic, then the middle.
    Pillow rounds after the first axis, and chooses which one that is."""
    while min(array.shape[:2]) // 2 >= size:
        array = resized(array, array.shape[0] // 2, array.shape[1] // 2, box, 0.5, orders[0])
    h, w = array.shape[:2]
    array = resized(array, *((size, round(w * size / h)) if h <= w else (round(h * size / w), size)), cubic, 2.0,
                    orders[1])
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top:top + size, left:left + size]


CROPS = [(1, 1, 1), (1, 1, 8), (2, 1, 8), (1, 3, 8), (3, 5, 8), (7, 7, 8), (8, 8, 8), (9, 8, 8), (8, 9, 8), (15, 15, 8),
         (16, 16, 8), (17, 16, 8), (15, 40, 8), (31, 33, 8), (33, 31, 8), (64, 64, 8),
         (65, 63, 8), (67, 129, 8), (100, 37, 7), (37, 100, 7), (53, 41, 13), (90, 50, 32), (49, 99, 5), (1, 300, 8),
         (300, 1, 8), (2, 255, 4), (300, 9, 4), (12, 17, 1), (33, 47, 3)]


@pytest.mark.parametrize("width,height,size", CROPS)
def test_the_crop_is_adms(width, height, size):
    image = noise_image(width * 1000 + height, width, height)
    found = centre_crop(image, size)
    differences = [
        np.abs(np.asarray(found).astype(float) - reference_crop(np.asarray(image).astype(float), size, orders)).max()
        for orders in itertools.product([False, True], repeat=2)]
    assert found.size == (size, size) and min(differences) <= 1   # Pillow's weights have 22 bits
    assert centre_crop(image.convert("L"), size).mode == "L"


def test_every_crop_is_square():
    wrong = [(w, h, s) for w in (1, 2, 3, 7, 16, 33, 100) for h in (1, 5, 8, 31, 64, 150)
             for s in (1, 2, 3, 7, 8, 31) if centre_crop(Image.new("L", (w, h)), s).size != (s, s)]
    assert not wrong


def test_a_thin_line_does_not_fill_the_memory(monkeypatch):
    original = Image.Image.resize
    def resize(image, size, *args, **kwargs):
        # a file of 100 bytes must not ask for 1.5 GB
        assert size[0] * size[1] <= Image.MAX_IMAGE_PIXELS, f"{image.size} becomes {size}"
        return original(image, size, *args, **kwargs)
    monkeypatch.setattr(Image.Image, "resize", resize)
    files = ImageFiles([encoded(Image.new("L", (1, 30000)), "PNG"), encoded(RGB, "PNG")].__getitem__, str, 2, 128)
    assert files.batch(torch.arange(2))["images"].shape == (2, 3, 128, 128)   # cropped, or a bad image


def test_pixels_become_numbers():
    found = to_tensor(Image.fromarray(np.array([[[0, 51, 255], [255, 102, 0]]], np.uint8)))
    assert found.shape == (3, 1, 2) and found.dtype == torch.float32 and torch.allclose(
        found[:, 0], torch.tensor([[-1, 1], [-0.6, -0.2], [1, -1]]))
    assert to_tensor(Image.new("L", (3, 2))).tolist() == [[[-1.0] * 3] * 2]


# --- folders

def test_labels_are_first_subfolders(tmp_path):
    for name in ("b/1.png", "b/deep/er/0.JPG", "a/0.jpeg", "a/z.webp", "Ä c/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(1).save(tmp_path / name)
    (tmp_path / "a" / "readme.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    files = image_folder(folder_config(tmp_path))
    assert [files.names(i) for i in range(len(files))] == ["a/0.jpeg", "a/z.webp", "b/1.png", "b/deep/er/0.JPG",
                                                           "Ä c/1.png"]
    assert (files.class_names == ["a", "b", "Ä c"] and files.num_classes == 3
            and files.labels.tolist() == [0, 0, 1, 1, 2] and files.shape == (3, 8, 8))
    assert files.batch(torch.tensor([4, 2]))["class_labels"].tolist() == [2, 1]
    plain = image_folder(folder_config(tmp_path, conditional=False))
    assert (plain.labels is None and plain.class_names == [] and plain.num_classes is None and len(plain) == 5
            and set(plain.batch(torch.arange(2))) == {"images"})


def test_folders_without_classes_and_loose_images(tmp_path):
    files = image_folder(folder_config(photos(tmp_path / "flat", 3, None)))
    assert files.labels is None and files.num_classes is None and len(files) == 3
    root = photos(tmp_path / "both", 4)
    noise_image(9).save(root / "loose.png")
    with pytest.raises(BadInput, match=r"holds images beside its class folders, first loose.png beside cat/: expected "
                       r"every image in a class folder, or data.conditional=false"):
        image_folder(folder_config(root))
    assert len(image_folder(folder_config(root, conditional=False))) == 5


def test_folders_without_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("")
    with pytest.raises(BadInput, match=r"holds no images: expected files ending in .png, .jpg"):
        image_folder(folder_config(tmp_path))
    with pytest.raises(BadInput,
                       match=r"data.size is null: expected the side in pixels that the images of .* are cropped to"):
        image_folder(folder_config(photos(tmp_path / "b"), size=None))


def test_hidden_files_and_folders_are_not_seen(tmp_path):
    root = photos(tmp_path / "photos", 4)
    photos(root / ".ipynb_checkpoints", 2)
    photos(root / "cat" / ".hidden", 2)
    (root / "cat" / "._00.png").write_bytes(b"")
    (root / ".loose.png").write_bytes(b"")
    files = image_folder(folder_config(root))
    assert len(files) == 4 and files.class_names == ["cat", "dog"]


def test_the_order_is_not_the_file_systems(tmp_path, monkeypatch):
    root, original = photos(tmp_path / "photos", 6, ("a", "b", "c")), os.walk
    listed = lambda: (lambda f: ([f.names(i) for i in range(6)], f.labels.tolist(), f.class_names))(
        image_folder(folder_config(root)))
    before = listed()
    def backwards(top, **kwargs):
        for folder, folders, files in original(top, **kwargs):
            folders.reverse()
            yield folder, folders, files[::-1]
    monkeypatch.setattr(os, "walk", backwards)
    assert listed() == before and before[1] == [0, 0, 1, 1, 2, 2]


def test_a_class_folder_may_be_a_link(tmp_path):
    root = photos(tmp_path / "photos", 2, ("cat",))
    (root / "dog").symlink_to(photos(tmp_path / "elsewhere", 1, None))
    assert image_folder(folder_config(root)).class_names == ["cat", "dog"]


def test_grey_images(tmp_path):
    files = image_folder(folder_config(photos(tmp_path, 2), channels=1))
    assert files.shape == (1, 8, 8)
    assert torch.equal(files.batch(torch.tensor([0]))["images"][0],
                       to_tensor(centre_crop(noise_image(0).convert("L"), 8)))


@pytest.mark.parametrize("change,match", [(dict(size=0), "data.size is 0: expected the side in pixels"), (
    dict(channels=2), "data.channels is 2: expected 1 or 3"), (dict(max_bad_images=-1), "data.max_bad_images is -1"),
                                          (dict(num_workers=-1), "data.num_workers is -1"),
                                          (dict(text_length=0), "data.text_length is 0: expected at least 1")])
def test_bad_settings(change, match):
    with pytest.raises(BadInput, match=match): load_data(DataConfig(**change))


# --- batches

def test_a_batch_is_a_function_of_its_indices(tmp_path):
    root, g = photos(tmp_path, 9, ("a", "b", "c"), bad=(3, 4, 8)), torch.Generator().manual_seed(0)
    requests = [torch.randint(9, (5,), generator=g) for _ in range(6)] + [torch.arange(9)]
    once = [SkippedImages(9, quiet).take(image_folder(folder_config(root)).batch(i)) for i in requests]
    for order in (range(7), reversed(range(7))):
        files = image_folder(folder_config(root))
        assert all(equal(SkippedImages(9, quiet).take(files.batch(requests[n])), once[n]) for n in order)
    assert (equal({k: v[[3, 4]] for k, v in once[-1].items()}, {k: v[[5, 5]] for k, v in once[-1].items()})
            and once[-1]["class_labels"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 0])


@pytest.mark.parametrize("kind", ["files", "digits"])
def test_flips_mirror(kind, tmp_path):
    data, indices, flip = (image_folder(folder_config(photos(tmp_path, 4))) if kind == "files" else digits(),
                           torch.tensor([2, 0, 3]), torch.tensor([True, False, True]))
    plain, mirrored = data.batch(indices), data.batch(indices, flip)
    assert torch.equal(mirrored["images"][1], plain["images"][1]) and torch.equal(mirrored["class_labels"],
                                                                                  plain["class_labels"])
    for i in (0, 2):
        assert torch.equal(mirrored["images"][i], plain["images"][i].flip(-1)) and not torch.equal(
            mirrored["images"][i], plain["images"][i])
    assert equal(data.batch(indices, torch.zeros(3, dtype=torch.bool)), plain)


def test_workers_read_the_same(tmp_path):
    files, indices = image_folder(folder_config(photos(tmp_path, 6, bad=(2,)))), [torch.tensor([0, 2]),
                                                                                  torch.tensor([5, 1])]
    loader = torch.utils.data.DataLoader(indices, batch_size=None, collate_fn=files.batch, num_workers=2)
    found = list(loader)
    assert found[0].pop("bad_images") == {"cat/02.png": "is no image that Pillow can read"}
    assert all(equal(a, {k: v for k, v in files.batch(i).items() if k != "bad_images"})
               for a, i in zip(found, indices, strict=True))


def test_files_and_folders_go_to_other_processes(tmp_path):
    files = image_folder(folder_config(photos(tmp_path, 3)))
    # macOS spawns the workers of a DataLoader
    assert equal(pickle.loads(pickle.dumps(files)).batch(torch.arange(3)), files.batch(torch.arange(3)))


# --- data sets

IMAGES = [noise_image(i) for i in range(4)]


def test_class_labels_and_plain_integers(tmp_path):
    named = saved(tmp_path, {"image": IMAGES, "label": [2, 0, 1, 2]},
                  {"label": datasets.ClassLabel(names=["x", "y", "z"])}, "named")
    plain = saved(tmp_path, {"image": IMAGES, "label": [2, 0, 0, 2]}, {"label": datasets.Value("uint8")}, "plain")
    for name, classes, labels in ((named, ["x", "y", "z"], [2, 0, 1, 2]), (plain, ["0", "1", "2"], [2, 0, 0, 2])):
        data = load_images(folder_config(name))
        batch = data.batch(torch.tensor([3, 1]))
        assert (isinstance(data, ImageFiles) and data.class_names == classes and data.labels.dtype == torch.int64
                and data.labels.tolist() == labels and batch["class_labels"].tolist() == [labels[3], labels[1]])
        assert (torch.equal(batch["images"], torch.stack([to_tensor(centre_crop(IMAGES[i], 8)) for i in (3, 1)]))
                and "captions" not in batch)
        assert load_images(folder_config(name, conditional=False)).labels is None


CLASSES = datasets.ClassLabel(names=["x", "y"])


@pytest.mark.parametrize("labels,feature,match", [
    ([0.5, 1, 2, 3], None, r"data.label_column 'label' holds Value\('float64'\): expected class numbers below a "
     r"million or a ClassLabel, or strings; data.conditional=false trains without labels"),
    ([0, 1, -1, 1], None, "label -1 of row 2 is out of range: expected 0 to 1"),
    ([0, 1, 1, -1], CLASSES, "label -1 of row 3 is out of range: expected 0 to 1"),
    ([[0, 1], [1, 0], [1, 1], [0, 0]], None, "expected class numbers below a million or a ClassLabel"),
    ([[0, 1], [1], [], [0]], None, "expected class numbers below a million or a ClassLabel"),
    ([0, 1, None, 1], CLASSES, "row 2"), ([0, 1, None, 1], None, "row 2"),
], ids=["floats", "negative", "negative-class", "lists", "ragged", "missing-class", "missing"])
def test_labels_that_are_none(labels, feature, match, tmp_path):
    name = saved(tmp_path, {"image": IMAGES, "label": labels}, {"label": feature} if feature else None)
    with pytest.raises(BadInput, match=match) as error: hub_data(folder_config(name))
    assert one_line(error) and str(error.value).startswith(name)
    assert len(hub_data(folder_config(name, conditional=False)).batch(torch.arange(4))["images"]) == 4


def test_a_class_label_out_of_range(tmp_path):
    name = saved(tmp_path, {"image": IMAGES, "label": [0, 1, 5, 1]})
    info = json.loads((Path(name) / "dataset_info.json").read_text())
    # as a data set that was written by other means
    info["features"]["label"] = {"names": ["x", "y"], "_type": "ClassLabel"}
    (Path(name) / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(BadInput, match="label 5 of row 2 is out of range: expected 0 to 1"):
        hub_data(folder_config(name))


@pytest.mark.parametrize("change,match", [
    (dict(image_column="imgae"), "unknown data.image_column 'imgae': did you mean 'image'"),
    (dict(caption_column="txt"), "unknown data.caption_column 'txt': did you mean 'text'"),
    (dict(image_column="text"), r"data.image_column 'text' holds Value\('string'\): expected images"),
    (dict(size=None), "data.size is null"),
    # a name that the user wrote
    (dict(label_column="lable"), "unknown data.label_column 'lable': did you mean 'label'"),
    (dict(caption_column="label"), "data.caption_column 'label' holds"),
    (dict(caption_column="texts"), "data.caption_column 'texts' holds"),
], ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "")
def test_wrong_columns(change, match, tmp_path):
    name = saved(tmp_path, {"image": IMAGES, "label": [0, 1, 0, 1], "text": list("abcd"), "texts": [["a", "b"]] * 4})
    with pytest.raises(BadInput, match=match) as error: hub_data(folder_config(name, **change))
    assert one_line(error)


def test_a_data_set_without_labels(tmp_path):
    assert hub_data(folder_config(saved(tmp_path, {"image": IMAGES}))).labels is None


def test_splits(tmp_path, monkeypatch):
    full = datasets.Dataset.from_dict({"image": IMAGES, "label": [0, 1, 0, 1]}).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=full, test=full.select([3])).save_to_disk(tmp_path / "splits")
    sizes = {split: len(hub_data(folder_config(tmp_path / "splits", split=split))) for split in ("train", "test")}
    assert sizes == {"train": 4, "test": 1}
    assert torch.equal(hub_data(folder_config(tmp_path / "splits", split="test")).image(0),
                       to_tensor(centre_crop(IMAGES[3], 8)))
    with pytest.raises(BadInput, match="unknown data.split 'tset': did you mean 'test'"):
        hub_data(folder_config(tmp_path / "splits", split="tset"))
    # datasets 5 cannot load an empty one that it saved
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: datasets.DatasetDict(none=full.select([])))
    with pytest.raises(BadInput, match="split 'none' of .* is empty: expected images"):
        hub_data(folder_config(tmp_path / "splits", split="none"))


@pytest.mark.parametrize("place", ["photos/train.parquet", "photos/data/train-00000-of-00001.parquet"])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_a_folder_of_parquet(place, relative, tmp_path, monkeypatch):
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    datasets.Dataset.from_dict({"image": IMAGES, "label": [0, 1, 0, 1],
                                "text": list("abcd")}).cast_column("image", datasets.Image()).to_parquet(str(file))
    monkeypatch.chdir(tmp_path)
    data = load_images(folder_config("photos" if relative else tmp_path / "photos", caption_column="text"))
    batch = data.batch(torch.tensor([2, 1]))
    assert (torch.equal(batch["images"][0], to_tensor(centre_crop(IMAGES[2], 8))) and batch["captions"] == ["c", "b"]
            and batch["class_labels"].tolist() == [0, 1])


def test_captions_of_a_folder(tmp_path):
    root = photos(tmp_path / "photos", 3, None)
    (root / "metadata.csv").write_text("file_name,text\n00.png,a cat\n01.png,\n02.png,\"a dog, two cats\"\n")
    assert (isinstance(load_images(folder_config(root)), ImageFiles)
            and load_images(folder_config(root)).captions is None)
    data = load_images(folder_config(root, caption_column="text"))
    assert ([data.captions(i) for i in range(3)] == ["a cat", "", "a dog, two cats"]
            and data.names(1) == "row 1 (01.png)")
    batch = data.batch(torch.tensor([2, 0]))
    assert batch["captions"] == ["a dog, two cats", "a cat"] and torch.equal(batch["images"][0],
                                                                             to_tensor(centre_crop(noise_image(2), 8)))
    with pytest.raises(BadInput, match="unknown data.caption_column 'txt': did you mean 'text'"):
        load_images(folder_config(root, caption_column="txt"))
    (root / "00.png").write_bytes(b"")   # the caption goes with the image
    data, said = load_images(folder_config(root, caption_column="text")), []
    assert (SkippedImages(1, said.append).take(data.batch(torch.tensor([0])))["captions"] == [""]
            and said == ["skipped image 1: row 0 (00.png) is empty (0 bytes)"])
    with pytest.raises(BadInput, match="unknown data.caption_column 'text'"):
        load_images(folder_config(photos(tmp_path / "without", 3, None), caption_column="text"))


@pytest.mark.parametrize("row,reason", [(dict(bytes=b"no image", path=None), "is no image that Pillow can read"),
                                        (dict(bytes=b"", path="x.png"), r"is empty \(0 bytes\)"), (None, ".+")],
                         ids=["damaged", "empty", "missing"])
def test_a_row_that_is_no_image(row, reason, tmp_path):
    rows = [dict(bytes=encoded(i, "PNG"), path=None) for i in IMAGES]
    rows[1] = row
    data, said = hub_data(folder_config(saved(tmp_path, {"image": rows, "label": [0, 0, 1, 1]}))), []
    batch = SkippedImages(1, said.append).take(data.batch(torch.tensor([1])))
    assert (torch.equal(batch["images"][0], to_tensor(centre_crop(IMAGES[2], 8)))
            and batch["class_labels"].tolist() == [1] and len(said) == 1)
    assert re.fullmatch(rf"skipped image 1: row 1( \(x.png\))? {reason}", said[0])


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow", "pandas"])
def test_a_format_that_was_saved_does_not_matter(kind, tmp_path):
    ds = datasets.Dataset.from_dict({"image": IMAGES, "label": [0, 1, 0, 1], "text": list("abcd")}).cast_column(
        "image", datasets.Image())
    ds.with_format(kind).save_to_disk(tmp_path / "saved")
    batch = hub_data(folder_config(tmp_path / "saved", caption_column="text")).batch(torch.arange(4))
    assert (torch.equal(batch["images"][3], to_tensor(centre_crop(IMAGES[3], 8)))
            and batch["class_labels"].tolist() == [0, 1, 0, 1] and batch["captions"] == list("abcd"))


def test_data_sets_that_cannot_be_loaded(tmp_path):
    with pytest.raises(BadInput, match="data.name is 'nobody/nothing', which datasets cannot load: ") as error:
        load_data(folder_config("nobody/nothing"))
    assert one_line(error)
    name = saved(tmp_path, {"image": IMAGES})
    for file in Path(name).glob("*.arrow"): file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BadInput, match="which datasets cannot load: ") as error: load_data(folder_config(name))
    assert one_line(error)


# --- names

def test_what_a_name_leads_to(tmp_path, models):
    root = photos(tmp_path / "photos", 3)
    assert isinstance(load_data(folder_config(root, vae=str(models / "vae"))), EncodedImages)
    assert isinstance(load_data("digits"), ImageData) and isinstance(load_data(), ImageData) and isinstance(
        load_data(folder_config(root)), ImageFiles)
    assert (load_data(DataConfig(conditional=False)).labels is None
            and load_data(DataConfig(conditional=False)).num_classes is None
            and load_data(DataConfig(size=8)).shape == (1, 8, 8))
    assert isinstance(load_data(folder_config(saved(tmp_path, {"image": IMAGES}))), ImageFiles)
    write_cache(folder_config(root, vae=str(models / "vae")), tmp_path / "latents")
    cache = load_data(str(tmp_path / "latents"))
    assert (isinstance(cache, LatentCache) and cache.num_classes == 2
            and load_data(DataConfig(name=str(tmp_path / "latents"), conditional=False)).num_classes is None)
    assert ("class_labels" not
            in load_data(DataConfig(name=str(tmp_path / "latents"), conditional=False)).batch(torch.arange(2)))


@pytest.mark.parametrize("name,error,match", [
    ("digts", BadInput, "unknown data set 'digts': did you mean 'digits'"),
    ("./fotos", MissingFile,
     "data.name is './fotos': there is no such folder; expected a folder of images, a latent cache, or owner/name"),
    ("/no/where/at/all", MissingFile, "there is no such folder"),
    ("{tmp}/nothing", MissingFile, "there is no such folder"),
    ("{tmp}/file.png", BadInput, "file.png', a file: expected a folder of images"),
    ("{tmp}/empty", BadInput, "holds no images"), ("nobody/nothing", BadInput, "which datasets cannot load"),
])
def test_names_that_lead_nowhere(name, error, match, tmp_path):
    (tmp_path / "file.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=match): load_data(folder_config(name.format(tmp=tmp_path)))


def test_built_in_data_have_their_size():
    with pytest.raises(BadInput, match="data.size is 16: expected null or 8, the size of the built-in digits"):
        load_data(DataConfig(size=16))


# --- the order of images

@pytest.mark.parametrize("number,size", [(10, 10), (10, 3), (10, 7), (7, 6), (5, 1)])
def test_every_epoch_holds_every_image(number, size):
    order = EpochOrder(number, size, 3)
    stream = torch.cat([order(s) for s in range(4 * number)])
    epochs = stream[:4 * size * (number // 1)][:len(stream) // number * number].view(-1, number)
    assert (all(e.sort().values.tolist() == list(range(number)) for e in epochs)
            and len({tuple(e.tolist()) for e in epochs}) > 1)
    for step in (4 * number - 1, 0, 2 * number):
        assert torch.equal(EpochOrder(number, size, 3)(step), stream[step * size:(step + 1) * size]) and torch.equal(
            order(step), stream[step * size:(step + 1) * size])
    assert number == 5 or not torch.equal(torch.cat([EpochOrder(number, size, 4)(s) for s in range(4 * number)]),
                                          stream)


def test_a_batch_is_not_larger_than_the_data():
    with pytest.raises(BadInput, match="train.batch_size is 11, but the data set has only 10 images"):
        EpochOrder(10, 11, 0)


# --- latents

@pytest.mark.parametrize("config", [dict(scaling_factor=0.5), dict(scaling_factor=SCALE, shift_factor=SHIFT), dict(
    scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)])
def test_latents_are_drawn_as_diffusers_draws_them(config):
    vae, images = autoencoder(4, **config), torch.rand(3, 3, 16, 16) * 2 - 1
    coder = LatentCoder(vae)
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(5))
        expected = (expected - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        moments = coder.moments(images)
        noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        assert (moments.shape == (3, 8, 8, 8) and torch.allclose(coder.draw(moments, noise), expected, atol=1e-6)
                and torch.allclose(draw_latents(moments, noise, coder.scale, coder.shift), expected, atol=1e-6))
        assert not torch.allclose(coder.draw(moments, 0 * noise), expected, atol=1e-2)
        assert torch.allclose(
            coder.draw(moments, 0 * noise),
            (vae.encode(images).latent_dist.mode() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor,
            atol=1e-6)
        decoded = vae.decode(expected / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
        assert torch.allclose(coder.decode(expected), decoded.clamp(-1, 1), atol=1e-5)
    assert coder.latent_shape((3, 16, 24)) == (4, 8, 12) and not any(p.requires_grad for p in coder.parameters())


def test_latents_of_half_precision_are_drawn_in_float32():
    moments = torch.randn(2, 8, 4, 4).half()
    assert draw_latents(moments, torch.zeros(2, 4, 4, 4), 2.0, 1.0).dtype == torch.float32 and torch.equal(
        draw_latents(moments, torch.zeros(2, 4, 4, 4), 2.0, 1.0), 2 * (moments[:, :4].float() - 1))


def test_images_that_a_vae_cannot_take(models, tmp_path):
    coder, root = load_vae(str(models / "vae")), photos(tmp_path / "photos", 2)
    with pytest.raises(BadInput, match="images have 1 channels, but VAE .* takes 3: set data.channels"):
        coder.latent_shape((1, 8, 8))
    with pytest.raises(BadInput, match="data.size is 9: expected a multiple of 2 for VAE"):
        coder.latent_shape((3, 9, 9))
    for change, match in ((dict(channels=1), "set data.channels"), (dict(size=9), "expected a multiple of 2")):
        with pytest.raises(BadInput, match=match):
            write_cache(folder_config(root, vae=str(models / "vae"), **change), tmp_path / "latents")
    assert not (tmp_path / "latents").exists()


def test_where_a_vae_comes_from(models, tmp_path):
    assert (fingerprint(load_vae(str(models / "vae")).vae) == fingerprint(load_vae(str(models / "pipeline")).vae)
            == fingerprint(load_vae(str(models / "pipeline" / "vae")).vae)
            != fingerprint(load_vae(str(models / "other")).vae))
    # as the hub's cache keeps them: a pipeline, and a VAE alone such as stabilityai/sd-vae-ft-ema
    for name, inner in (("nobody/pipeline", "vae"), ("nobody/vae", ".")):
        repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(models / "vae", repo / "snapshots" / ("0" * 40) / inner)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0" * 40)
        assert fingerprint(load_vae(name).vae) == fingerprint(load_vae(str(models / "vae")).vae), name


def broken_vae(folder, kind, models):
    if kind == "a hub id": return "nobody/nothing"
    if kind == "a DiT": tiny_diffusers_dit().save_pretrained(folder)
    elif kind == "another VAE":
        AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                        num_decoder_blocks=(1, 1)).save_pretrained(folder)
    elif kind != "nothing":
        shutil.copytree(models / "vae", folder)
        weights = folder / "diffusion_pytorch_model.safetensors"
        if kind == "no weights": weights.unlink()
        if kind == "cut weights": weights.write_bytes(weights.read_bytes()[:500])
        if kind == "half the weights": save_file(dict(list(load_file(weights).items())[::2]), weights, {"format": "pt"})
        if kind == "broken config": (folder / "config.json").write_text("{")
    return str(folder)


@pytest.mark.parametrize("kind", ["a hub id", "nothing", "a DiT", "another VAE", "no weights", "cut weights",
                                  "half the weights", "broken config"])
def test_what_is_no_vae(kind, models, tmp_path):
    name = broken_vae(tmp_path / "vae", kind, models)
    # and no weights that are made up
    with pytest.raises(BadInput,
                       match="data.vae is .*: expected a diffusers AutoencoderKL or a pipeline with one") as error:
        load_vae(name)
    assert one_line(error)


# --- captions

def test_clip_is_what_stable_diffusion_takes(models):
    coder, captions = load_text_encoder(str(models / "clip")), ["a cat", "",
                                                                "a dog and a cat and a dog and a cat and a dog"]
    pipe = StableDiffusionPipeline(vae=None, unet=None, scheduler=None, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False, tokenizer=coder.tokenizer, text_encoder=coder.encoder)
    expected, _ = pipe.encode_prompt(captions, "cpu", 1, False)
    tokens = coder.tokens(captions)
    found = coder.embed(**tokens)
    assert (set(found) == {"encoder_hidden_states", "pooled_projections"} and found["encoder_hidden_states"].shape
            == (3, PROMPT_LENGTH, 32) and torch.allclose(found["encoder_hidden_states"], expected, atol=1e-6))
    assert (torch.equal(found["pooled_projections"], coder.encoder(tokens["input_ids"]).pooler_output)
            and coder.length == PROMPT_LENGTH and load_text_encoder(str(models / "clip"), 5).length == PROMPT_LENGTH)
    assert not any(p.requires_grad for p in coder.parameters())
    projected = load_text_encoder(str(models / "clip-projection"))
    out = projected.encoder(tokens["input_ids"])
    assert torch.equal(projected.embed(**tokens)["pooled_projections"], out.text_embeds) and torch.equal(
        projected.embed(**tokens)["encoder_hidden_states"], out.last_hidden_state)


def test_t5_is_what_pixart_takes(models):
    coder, captions = load_text_encoder(str(models / "t5"), 7), ["a cat", "", "a dog and a cat"]
    pipe = PixArtSigmaPipeline(tokenizer=coder.tokenizer, text_encoder=coder.encoder, vae=autoencoder(4),
                               transformer=None, scheduler=DDIMScheduler())
    expected, mask, *_ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=7)
    found = coder.embed(**coder.tokens(captions))
    assert (set(found) == {"encoder_hidden_states", "encoder_attention_mask"}
            and torch.allclose(found["encoder_hidden_states"], expected, atol=1e-5)
            and torch.equal(found["encoder_attention_mask"], mask))
    assert found["encoder_attention_mask"].sum(1).tolist() == [7, 1, 7]              # ▁a▁cat</s>, </s>, cut
    assert (load_text_encoder(str(models / "t5")).length == PROMPT_LENGTH
            and load_text_encoder(str(models / "t5"), 3).tokens(["a cat"])["input_ids"].shape == (1, 3))


def test_a_text_encoder_is_loaded_in_float32(models, tmp_path):
    shutil.copytree(models / "clip", tmp_path / "half")
    load_text_encoder(str(models / "clip")).encoder.half().save_pretrained(tmp_path / "half" / "text_encoder")
    # transformers 5 keeps what was saved
    assert next(load_text_encoder(str(tmp_path / "half")).parameters()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["nobody/nothing", "nowhere", "no tokenizer", "no encoder", "no weights",
                                  "cut weights", "half the weights", "broken config", "unknown type"])
def test_what_is_no_text_encoder(kind, models, tmp_path):
    folder = tmp_path / kind
    if kind not in ("nowhere", "nobody/nothing"):
        shutil.copytree(models / "clip", folder)
        weights = folder / "text_encoder" / "model.safetensors"
        if kind.startswith("no "):
            (shutil.rmtree(folder / "tokenizer") if kind == "no tokenizer"
             else shutil.rmtree(folder / "text_encoder") if kind == "no encoder" else weights.unlink())
        if kind == "cut weights": weights.write_bytes(weights.read_bytes()[:300])
        if kind == "half the weights": save_file(dict(list(load_file(weights).items())[::2]), weights, {"format": "pt"})
        if kind == "broken config": (folder / "text_encoder" / "config.json").write_text("{")
        if kind == "unknown type": (folder / "text_encoder" / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(BadInput, match=r"data.text_encoder is .*: expected a pipeline with tokenizer/ and "
                       r"text_encoder/") as error:
        load_text_encoder(kind if "/" in kind else str(folder))
    assert one_line(error)


# --- encoded in the loop

def test_images_are_encoded_in_the_loop(models, tmp_path):
    name = saved(tmp_path, {"image": IMAGES, "label": [1, 0, 1, 1], "text": ["a cat", "a dog", None, "cat"]},
                 {"label": CLASSES})
    config = folder_config(name, vae=str(models / "vae"), caption_column="text", text_encoder=str(models / "t5"),
                           text_length=6)
    data, coder, text = load_data(config), load_vae(str(models / "vae")), load_text_encoder(str(models / "t5"), 6)
    assert (isinstance(data, EncodedImages) and data.shape == (4, 4, 4) and len(data) == 4 and data.num_classes == 2
            and data.random_latents and data.to("cpu") is data)
    indices, flip, drop = (torch.tensor([3, 0, 1]), torch.tensor([True, False, False]),
                           torch.tensor([False, False, True]))
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    batch = data.batch(indices, flip, noise, drop)
    # pixels: the loader's workers do not encode
    assert batch["images"].shape == (3, 3, 8, 8)
    found, again = data.encode(batch), data.encode(batch)
    assert (equal(found, again)
            and set(found) == {"images", "class_labels", "encoder_hidden_states", "encoder_attention_mask"}
            and found["class_labels"].tolist() == [1, 1, 0])
    images = torch.stack([to_tensor(centre_crop(IMAGES[i], 8)) for i in (3, 0, 1)])
    images[0] = images[0].flip(-1)
    assert torch.allclose(found["images"], coder.draw(coder.moments(images), noise), atol=1e-6) and torch.allclose(
        data.encode(data.batch(indices, flip))["images"], coder.draw(coder.moments(images), 0 * noise), atol=1e-6)
    direct = text.embed(**text.tokens(["cat", "a cat", ""]))
    assert all(torch.allclose(found[k], v, atol=1e-6) for k, v in direct.items()) and all(
        torch.allclose(data.null[k], v[2], atol=1e-6) for k, v in direct.items())
    assert torch.equal(data.decode(found["images"]), coder.decode(found["images"]))
    cache = write_cache(config, tmp_path / "latents", say=quiet)                    # and a cache gives the same
    cached, once = cache.batch(indices, flip, noise, drop), data.encode(batch)
    assert (cached.keys() == once.keys()
            and all(torch.allclose(cached[k].float(), once[k].float(), atol=1e-4) for k in once)
            and torch.allclose(cache.decode(cached["images"]), data.decode(cached["images"])))


def test_a_bad_image_in_the_loop_is_named(models, tmp_path):
    data = load_data(folder_config(photos(tmp_path / "photos", 4, bad=(1,)), vae=str(models / "vae")))
    said = []
    batch = SkippedImages(1, said.append).take(data.batch(torch.tensor([1, 3])))
    assert (said == ["skipped image 1: cat/01.png is no image that Pillow can read"]
            and data.encode(batch)["class_labels"].tolist() == [1, 1] and data.null == {})


def test_captions_without_latents(models, tmp_path):
    data = load_data(folder_config(captioned(tmp_path), caption_column="text", text_encoder=str(models / "clip")))
    found = data.encode(data.batch(torch.tensor([0, 4]), drop=torch.tensor([True, False])))
    assert (isinstance(data, EncodedImages) and not data.random_latents and data.shape == (3, 8, 8)
            and set(found) == {"images", "encoder_hidden_states", "pooled_projections"})
    assert (torch.allclose(found["pooled_projections"][0], data.null["pooled_projections"], atol=1e-6)
            and not torch.allclose(found["pooled_projections"][1], data.null["pooled_projections"], atol=1e-3))
    assert torch.equal(data.decode(found["images"]), found["images"])
    with pytest.raises(BadInput, match="data.text_encoder is null: expected a pipeline"):
        load_data(folder_config(captioned(tmp_path), caption_column="text"))


def test_a_cache_decodes_with_its_own_vae_only(models, tmp_path):
    shutil.copytree(models / "vae", tmp_path / "vae")
    cached(photos(tmp_path / "photos", 3), models, tmp_path / "latents", vae=str(tmp_path / "vae"))
    latents = LatentCache(tmp_path / "latents").batch(torch.arange(3))["images"]
    assert torch.allclose(LatentCache(tmp_path / "latents").decode(latents),
                          load_vae(str(models / "vae")).decode(latents))
    shutil.rmtree(tmp_path / "vae")
    with pytest.raises(BadInput, match="data.vae|VAE"): LatentCache(tmp_path / "latents").decode(latents)
    shutil.copytree(models / "other" / "vae", tmp_path / "vae")
    with pytest.raises(BadInput, match="is not the one that latent cache .* was made with: expected fingerprint"):
        LatentCache(tmp_path / "latents").decode(latents)


# --- the latent cache

def cached(folder, models, where, **kwargs):
    changes = {k: kwargs.pop(k) for k in list(kwargs) if k in DataConfig.__dataclass_fields__}
    return write_cache(folder_config(folder, **{"vae": str(models / "vae"), **changes}), where,
                       **{**dict(batch_size=2, images_per_shard=3, say=quiet), **kwargs})


def captioned(tmp_path, texts=("a cat", "", "a dog", "dog dog dog dog", "cat"), bad=(), name="captioned"):
    rows = [dict(bytes=b"" if i in bad else encoded(noise_image(i), "PNG"), path=None) for i in range(len(texts))]
    return saved(tmp_path, {"image": rows, "text": list(texts), "other": [f"b {t}" for t in texts]}, name=name)


def test_a_cache_is_direct_encoding(models, tmp_path):
    root = photos(tmp_path / "photos", 8, bad=(3,))
    said = []
    cache, files, coder = (cached(root, models, tmp_path / "latents", say=said.append),
                           image_folder(folder_config(root)), load_vae(str(models / "vae")))
    kept = [0, 1, 2, 4, 5, 6, 7]
    assert (len(cache) == 7 and cache.shape == (4, 4, 4) and cache.class_names == ["cat", "dog"]
            and cache.num_classes == 2 and cache.labels.tolist() == [0, 0, 0, 1, 1, 1, 1] and cache.null == {})
    assert (said == ["skipped image 1: cat/03.png is no image that Pillow can read"]
            and cache.facts["shards"][1]["skipped"] == {"cat/03.png": "is no image that Pillow can read"})
    assert ([e["images"] for e in cache.facts["shards"]] == [3, 2, 2]
            and (cache.facts["scale"], cache.facts["shift"], cache.facts["images"]) == (SCALE, SHIFT, 7))
    indices, g = torch.tensor([6, 0, 3, 4, 2, 3]), torch.Generator().manual_seed(0)
    noise, flip = torch.randn(6, 4, 4, 4, generator=g), torch.tensor([True, False, True, False, True, False])
    images = torch.stack([files.image(kept[i]) for i in indices.tolist()])
    direct = lambda images, noise: (coder.vae.encode(images).latent_dist.mean
                                    + coder.vae.encode(images).latent_dist.std * noise - SHIFT) * SCALE
    batch = cache.batch(indices, flip, noise)
    assert (set(batch) == {"images", "class_labels"} and batch["class_labels"].tolist() == [1, 0, 1, 1, 0, 1]
            and batch["images"].dtype == torch.float32)
    assert torch.allclose(batch["images"],
                          direct(torch.where(flip[:, None, None, None], images.flip(-1), images), noise), atol=1e-5)
    assert torch.allclose(cache.batch(indices)["images"], direct(images, 0 * noise), atol=1e-5) and not torch.allclose(
        cache.batch(indices)["images"], batch["images"], atol=1e-3)
    assert (batch["images"][2] - batch["images"][5]).abs().max() > 1e-3                  # the same image, mirrored


def test_digits_can_be_cached_too(tmp_path, monkeypatch):
    few = ImageData(digits().images[:5], digits().labels[:5], digits().class_names)
    monkeypatch.setitem(sources.DATASETS, "digits", sources.SourceEntry(lambda config: few))
    autoencoder(2, in_channels=1, out_channels=1).save_pretrained(tmp_path / "vae")
    cache = write_cache(DataConfig(vae=str(tmp_path / "vae")), tmp_path / "latents", images_per_shard=2)
    assert len(cache) == 5 and cache.num_classes == 10 and torch.equal(cache.batch(torch.arange(5))["class_labels"],
                                                                       few.labels)


@pytest.mark.parametrize("encoder", ["clip", "clip-projection", "t5"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_captions_are_cached(encoder, dtype, models, tmp_path):
    texts = ["a cat", "", "a dog", "dog dog dog dog", "cat"]
    root = captioned(tmp_path, texts)
    cache = cached(root, models, tmp_path / "latents", caption_column="text", text_encoder=str(models / encoder),
                   text_length=9, dtype=dtype)
    text = load_text_encoder(str(models / encoder), 9)
    found, indices = cache.batch(torch.tensor([4, 1, 2])), [4, 1, 2]
    direct = text.embed(**text.tokens([texts[i] for i in indices]))
    close = dict(atol=1e-5) if dtype == "float32" else dict(atol=5e-3, rtol=1e-3)
    assert (set(found) == {"images", *direct} and set(direct) <= set(anatomy.TEXT_INPUTS)
            and set(cache.null) == set(direct))
    for k, v in direct.items():
        assert found[k].dtype == (torch.int64 if k.endswith("mask")
                                  else torch.float32) and torch.allclose(found[k], v, **close), k
        # the empty caption's
        assert torch.equal(cache.null[k].to(found[k].dtype),
                           found[k][1]) or torch.allclose(cache.null[k].float(), found[k][1].float(), **close), k
        # a model takes either
        assert cache.null[k].shape == v.shape[1:] and cache.null[k].dtype == found[k].dtype, k
        # without images; of new captions
        assert torch.equal(cache.texts(None, torch.tensor([2, 4]))[k], found[k][[2, 0]]) and torch.allclose(
            cache.texts([texts[i] for i in indices])[k].float(), v.float(), **close), k
    dropped = cache.batch(torch.tensor([4, 1, 2]), drop=torch.tensor([True, False, False]))
    assert all(torch.equal(dropped[k][1:], found[k][1:])
               and torch.equal(dropped[k][0], cache.null[k].to(found[k].dtype)) for k in direct) and torch.equal(
                   dropped["images"], found["images"])
    assert not torch.allclose(found["encoder_hidden_states"][0], found["encoder_hidden_states"][2], atol=1e-2)
    assert load_file(tmp_path / "latents" / "shard-00000.safetensors")["moments"].dtype == getattr(torch, dtype)


def test_labels_and_captions_together(models, tmp_path):
    columns = {"image": IMAGES, "label": [1, 0, 1, 1], "text": ["a cat", "a dog", None, "cat"]}
    cache = cached(saved(tmp_path, columns, {"label": CLASSES}), models, tmp_path / "latents", caption_column="text",
                   text_encoder=str(models / "clip"))
    batch = cache.batch(torch.arange(4))
    assert (set(batch) == {"images", "class_labels", "encoder_hidden_states", "pooled_projections"}
            and batch["class_labels"].tolist() == [1, 0, 1, 1] and cache.class_names == ["x", "y"])
    assert torch.allclose(batch["pooled_projections"][2], cache.null["pooled_projections"], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cache_of_half_precision(dtype, models, tmp_path):
    root = photos(tmp_path / "photos", 4)
    whole, half = cached(root, models, tmp_path / "whole"), cached(root, models, tmp_path / "half", dtype=dtype)
    a, b = whole.batch(torch.arange(4))["images"], half.batch(torch.arange(4))["images"]
    assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 2e-2 and torch.equal(
        half.batch(torch.arange(4))["class_labels"], whole.labels)
    assert load_file(tmp_path / "half" / "shard-00000.safetensors")["moments"].dtype == getattr(torch, dtype)


@pytest.mark.parametrize("change,match",
                         [(dict(dtype="float61"), "unknown dtype 'float61': did you mean 'float16'"),
                          (dict(vae=None), "data.vae is null: expected the VAE"),
                          (dict(batch_size=0), "batch_size is 0: expected at least 1"),
                          (dict(images_per_shard=0), "images_per_shard is 0"), (dict(part=(0, 0)), "part"),
                          (dict(part=(2, 2)), "part"), (dict(part=(-1, 2)), "part")])
def test_bad_arguments(change, match, models, tmp_path):
    with pytest.raises(BadInput, match=match):
        cached(photos(tmp_path / "photos", 2), models, tmp_path / "latents", **change)
    assert not (tmp_path / "latents").exists()


def test_captions_need_a_text_encoder(models, tmp_path):
    with pytest.raises(BadInput, match="data.text_encoder is null: expected a pipeline"):
        cached(captioned(tmp_path), models, tmp_path / "latents", caption_column="text")


@pytest.mark.parametrize("function,last",
                         [("write_json", "plan.json"), ("write_atomic", "null.safetensors"),
                          ("write_atomic", "shard-00000.safetensors"), ("write_json", "shard-00001.json"),
                          ("write_atomic", "shard-00002.safetensors"), ("write_json", "latents.json")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_and_continued_is_byte_identical(function, last, when, models, tmp_path, monkeypatch):
    root = captioned(tmp_path, ["a", "b", "c", "", "e", "f", "g"], bad=(3,))
    kwargs = dict(caption_column="text", text_encoder=str(models / "t5"))
    cached(root, models, tmp_path / "whole", **kwargs)
    original = getattr(data_cache, function)
    def die(path, value):
        if when == "after" and Path(path).name == last: original(path, value)
        if Path(path).name == last: raise Killed
        return original(path, value)
    monkeypatch.setattr(data_cache, function, die)
    with pytest.raises(Killed): cached(root, models, tmp_path / "broken", **kwargs)
    monkeypatch.setattr(data_cache, function, original)
    there = content(tmp_path / "broken") if (tmp_path / "broken").exists() else {}
    kept = {p: (tmp_path / "broken" / p.replace(".json", ".safetensors")).stat().st_mtime_ns
            for p in there if p.startswith("shard") and p.endswith("json")}
    assert len(cached(root, models, tmp_path / "broken", **kwargs)) == 6
    assert content(tmp_path / "broken") == content(tmp_path / "whole") and len(there) < 9 or last == "latents.json"
    # what was done is not done again
    assert all((tmp_path / "broken" / p.replace(".json", ".safetensors")).stat().st_mtime_ns == t
               for p, t in kept.items())


def test_a_batch_that_cannot_be_encoded_leaves_no_half_shard(models, tmp_path, monkeypatch):
    root, original, calls = photos(tmp_path / "photos", 7), LatentCoder.moments, []
    def die(coder, images):
        calls.append(1)
        if len(calls) == 6: raise Killed     # in the middle of the second shard: two batches a shard, each mirrored
        return original(coder, images)
    monkeypatch.setattr(LatentCoder, "moments", die)
    with pytest.raises(Killed): cached(root, models, tmp_path / "broken")
    monkeypatch.setattr(LatentCoder, "moments", original)
    assert set(content(tmp_path / "broken")) == {"plan.json", "shard-00000.safetensors", "shard-00000.json"}
    with pytest.raises(BadInput, match=r"is a latent cache that is not complete, 1 of 3 shards: expected one that "
                       r"dmp-wb latents has finished; run it again to go on"):
        load_data(str(tmp_path / "broken"))
    cached(root, models, tmp_path / "broken"), cached(root, models, tmp_path / "whole")
    assert content(tmp_path / "broken") == content(tmp_path / "whole")


def test_parts_make_the_same_cache(models, tmp_path):
    root = photos(tmp_path / "photos", 10, bad=(4, 9))
    whole = cached(root, models, tmp_path / "whole")
    assert (cached(root, models, tmp_path / "parts", part=(1, 2)) is None
            and not (tmp_path / "parts" / "latents.json").exists())
    assert len(list((tmp_path / "parts").glob("shard-*.safetensors"))) == 2
    with pytest.raises(BadInput, match="not complete, 2 of 4 shards"): LatentCache(tmp_path / "parts")
    assert len(cached(root, models, tmp_path / "parts", part=(0, 2))) == len(whole) == 8
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    assert len(cached(root, models, tmp_path / "parts", part=(1, 2))) == 8                # a complete one is opened
    cached(root, models, tmp_path / "many", part=(5, 9))                                    # more processes than shards
    assert set(content(tmp_path / "many")) == {"plan.json"}


SCRIPT = """
import json, sys, time
import dmp_wb.data as D
config, folder, part, pause = json.loads(sys.argv[1])
original = D.LatentCoder.moments
D.LatentCoder.moments = lambda *args: (time.sleep(pause), original(*args))[1]
D.write_cache(D.DataConfig(**config), folder, batch_size=2, images_per_shard=2, part=tuple(part))
"""


def process(config, folder, part=(0, 1), pause=0.0):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps([vars(config), str(folder), part, pause])],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_at_once_and_one_is_killed(models, tmp_path):
    config, folder = (folder_config(photos(tmp_path / "photos", 23, bad=(5,)), vae=str(models / "vae")),
                      tmp_path / "latents")
    killed, other = (process(config, folder, (i, 2), pause=0.1) for i in range(2))
    while not (folder / "shard-00002.json").exists():      # the second of six of its own
        time.sleep(0.01)
        assert killed.poll() is None, killed.communicate()[1]
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    error = other.communicate()[1]
    assert other.returncode == 0, error
    with pytest.raises(BadInput, match=r"not complete, (8|9|10|11) of 12 shards"): LatentCache(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                               # as the processes
    try:
        cache, whole = (write_cache(config, where, batch_size=2, images_per_shard=2, say=quiet)
                        for where in (folder, tmp_path / "whole"))
    finally: torch.set_num_threads(threads)
    assert content(folder) == content(tmp_path / "whole") and len(cache) == len(whole) == 22


def test_a_moved_data_folder_is_the_same(models, tmp_path):
    root = photos(tmp_path / "photos", 7)
    whole = cached(root, models, tmp_path / "latents")
    before = content(tmp_path / "latents")
    for name in ("shard-00001.safetensors", "shard-00001.json", "latents.json"): (tmp_path / "latents" / name).unlink()
    shutil.move(root, tmp_path / "elsewhere")
    assert len(cached(tmp_path / "elsewhere", models, tmp_path / "latents", vae=str(models / "pipeline"))) == len(whole)
    after = content(tmp_path / "latents")
    assert {k for k in before if before[k] != after[k]} <= {"latents.json"}


OTHER = {   # changes to the second call of `write_cache`, and what its error names
    "vae": (dict(vae="other"), "vae_fingerprint is '[0-9a-f]{16}' there and '[0-9a-f]{16}' here"),
    "size": (dict(size=10), "size is 8 there and 10 here"),
    "dtype": (dict(dtype="float16"), "dtype is 'float32' there and 'float16' here"),
    "images_per_shard": (dict(images_per_shard=4), "images_per_shard is 3 there and 4 here"),
    "captions": (dict(caption_column="other"), "caption|list"),
    "text encoder": (dict(text_encoder="clip-2"), "text_fingerprint is '[0-9a-f]{16}' there"),
    "text length": (dict(text_encoder="t5", text_length=4), "text_fingerprint|text_length"),
    "no text": (dict(caption_column=None, text_encoder=None), "text_fingerprint|caption|list"),
}


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("name", OTHER)
def test_a_cache_of_something_else_is_refused(name, complete, models, tmp_path):
    root, (change, match) = captioned(tmp_path), OTHER[name]
    same = dict(caption_column="text", text_encoder=str(models / "clip"))
    cached(root, models, tmp_path / "latents", **same)
    if not complete:
        for file in ("shard-00001.safetensors", "shard-00001.json", "latents.json"):
            (tmp_path / "latents" / file).unlink()
    before = content(tmp_path / "latents")
    change = {k: str(models / v) if k in ("vae", "text_encoder") and v else v for k, v in change.items()}
    with pytest.raises(BadInput, match=f"holds latents of something else: .*({match})") as error:
        cached(root, models, tmp_path / "latents", **{**same, **change})
    assert "expected the same, or another folder" in str(error.value) and content(tmp_path / "latents") == before


def test_another_list_of_images_is_refused(models, tmp_path):
    root = photos(tmp_path / "photos", 5)
    cached(root, models, tmp_path / "latents")
    for change, match in (("another name", "list is '[0-9a-f]{16}' there and '[0-9a-f]{16}' here"),
                          ("one more", "images is 5 there and 6 here"), ("another class", "class_names is")):
        if change == "another name": (root / "cat" / "00.png").rename(root / "cat" / "000.png")
        if change == "one more": noise_image(99).save(root / "dog" / "99.png")
        if change == "another class":
            (root / "dog" / "99.png").unlink()
            (root / "dog").rename(root / "dogs")
        with pytest.raises(BadInput, match=match if change != "another class" else "something else"):
            cached(root, models, tmp_path / "latents")
    (root / "dogs").rename(root / "dog")
    (root / "cat" / "000.png").rename(root / "cat" / "00.png")
    assert len(cached(root, models, tmp_path / "latents")) == 5


def test_other_labels_and_another_split_are_refused(models, tmp_path):
    ds = datasets.Dataset.from_dict({"image": IMAGES, "label": [0, 1, 0, 1]}).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=ds, test=ds.select([3, 2, 1, 0]).remove_columns("label").add_column(
        "label", [0, 1, 0, 1])).save_to_disk(tmp_path / "splits")
    cached(tmp_path / "splits", models, tmp_path / "latents")
    with pytest.raises(BadInput, match="something else"):
        cached(tmp_path / "splits", models, tmp_path / "latents", conditional=False)
    # as many rows, the same labels, other images
    with pytest.raises(BadInput, match="something else"):
        cached(tmp_path / "splits", models, tmp_path / "latents", split="test")


def test_the_vae_is_known_by_its_weights_not_by_its_name(models, tmp_path):
    root, where = photos(tmp_path / "photos", 4), tmp_path / "same-name"
    shutil.copytree(models / "vae", where)
    cached(root, models, tmp_path / "latents", vae=str(where))
    shutil.rmtree(where)
    shutil.copytree(models / "other" / "vae", where)
    with pytest.raises(BadInput, match="vae_fingerprint is"): cached(root, models, tmp_path / "latents", vae=str(where))
    with pytest.raises(BadInput, match="was made with another VAE"):
        load_data(DataConfig(name=str(tmp_path / "latents"), vae=str(where)))


@pytest.mark.parametrize("change,match", [
    (dict(size=16), "data.size is 16, but latent cache .* was made of 8 × 8 images: expected a cache of that size"),
    (dict(vae="other"), "was made with another VAE, .*, than data.vae .*: expected the same"),
    (dict(text_encoder="clip-2"), "text encoder"), (dict(text_encoder="t5"), "text encoder"),
    (dict(vae="nowhere"), "data.vae is .*nowhere"),
    (dict(), None), (dict(size=8, vae="pipeline", text_encoder="clip"), None),
])
def test_a_cache_is_checked_against_the_experiment(change, match, models, tmp_path):
    cached(captioned(tmp_path), models, tmp_path / "latents", caption_column="text", text_encoder=str(models / "clip"))
    config = DataConfig(name=str(tmp_path / "latents"),
                        **{k: str(models / v) if isinstance(v, str) else v for k, v in change.items()})
    if match is None: assert len(load_data(config)) == 5
    else:
        with pytest.raises(BadInput, match=match): load_data(config)


def flip_bit(file):
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", ["cut", "bit", "bit, same time", "longer", "missing"])
def test_a_damaged_shard(damage, models, tmp_path):
    root, folder = photos(tmp_path / "photos", 7), tmp_path / "latents"
    cached(root, models, folder)
    whole, file = content(folder), folder / "shard-00001.safetensors"
    times = file.stat()
    if damage == "cut": file.write_bytes(file.read_bytes()[:-10])
    if damage.startswith("bit"): flip_bit(file)
    if damage == "longer": file.write_bytes(file.read_bytes() + b"0")
    if damage == "missing": file.unlink()
    if damage == "bit, same time":
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        (folder / ".verified.json").unlink()
    for _ in range(2):
        with pytest.raises(MissingFile if damage == "missing" else BadInput,
                           match="lacks shard-00001.safetensors: remove latents.json and shard-00001.json"
                           if damage == "missing" else "shard-00001.safetensors does not match its checksum: remove it "
                           "with shard-00001.json and latents.json"):
            load_data(str(folder))
    for name in (file.name, "shard-00001.json", "latents.json"): (folder / name).unlink(missing_ok=True)   # as it says
    cached(root, models, folder)
    assert content(folder) == whole and len(load_data(str(folder))) == 7


def test_a_shard_is_verified_once(models, tmp_path, monkeypatch):
    cached(photos(tmp_path / "photos", 7), models, tmp_path / "latents")
    read, original = [], core_files.sha256_of
    monkeypatch.setattr(cache_facts, "sha256_of", lambda file: read.append(Path(file).name) or original(file))
    LatentCache(tmp_path / "latents")
    assert read == []
    os.utime(tmp_path / "latents" / "shard-00002.safetensors", ns=(1, 1))
    LatentCache(tmp_path / "latents")
    assert read == ["shard-00002.safetensors"]
    (tmp_path / "latents" / ".verified.json").write_text("{")      # a note of ours, which may be lost
    assert len(LatentCache(tmp_path / "latents")) == 7 and len(read) == 4


@pytest.mark.parametrize("damage", ["missing", "cut", "bit"])
def test_a_damaged_null_embedding(damage, models, tmp_path):
    cached(captioned(tmp_path), models, tmp_path / "latents", caption_column="text", text_encoder=str(models / "clip"))
    file = tmp_path / "latents" / "null.safetensors"
    if damage == "missing": file.unlink()
    elif damage == "cut": file.write_bytes(file.read_bytes()[:40])
    else: flip_bit(file)
    with pytest.raises(BadInput, match="null.safetensors"): LatentCache(tmp_path / "latents")


@pytest.mark.parametrize("name,text,match", [
    ("latents.json", "{", "is not valid JSON"),
    ("latents.json", '{"format": 7}', "holds a cache of format 7: expected 1 or 2, which this version of dmp_wb reads"),
    ("plan.json", "{", "is not valid JSON"),
    ("plan.json", '{"format": 7}', "holds a cache of format 7: expected 1, which this version of dmp_wb writes")])
def test_another_format(name, text, match, models, tmp_path):
    root = photos(tmp_path / "photos", 4)
    cached(root, models, tmp_path / "latents")
    (tmp_path / "latents" / name).write_text(text)
    with pytest.raises(BadInput, match=match):
        cached(root, models, tmp_path / "latents") if name == "plan.json" else load_data(str(tmp_path / "latents"))


def test_a_plan_alone_is_an_incomplete_cache(models, tmp_path):
    root = photos(tmp_path / "photos", 7)
    cached(root, models, tmp_path / "latents", part=(6, 7))
    with pytest.raises(BadInput, match="not complete, 0 of 3 shards"): load_data(str(tmp_path / "latents"))
    with pytest.raises(MissingFile, match="no file"): LatentCache(root)


def test_a_cache_in_a_folder_that_cannot_be_written(models, tmp_path, monkeypatch):
    cached(photos(tmp_path / "photos", 7), models, tmp_path / "latents")
    expected = LatentCache(tmp_path / "latents").batch(torch.arange(7))
    (tmp_path / "latents" / ".verified.json").unlink()
    (tmp_path / "latents").chmod(stat.S_IRUSR | stat.S_IXUSR)
    def refuse(path, obj): raise OSError(30, "Read-only file system")    # root can write everywhere
    monkeypatch.setattr(cache_facts, "write_json", refuse)
    try:
        assert (equal(LatentCache(tmp_path / "latents").batch(torch.arange(7)), expected)
                and not (tmp_path / "latents" / ".verified.json").exists())
    finally: (tmp_path / "latents").chmod(0o755)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_cache_goes_to_other_processes(start, models, tmp_path):
    cache = cached(photos(tmp_path / "photos", 7), models, tmp_path / "latents")
    indices = [torch.tensor([0, 6, 3]), torch.tensor([2, 5])]
    expected = [cache.batch(i) for i in indices]          # its files are open
    assert equal(pickle.loads(pickle.dumps(cache)).batch(indices[0]), expected[0])
    found = list(torch.utils.data.DataLoader(indices, batch_size=None, collate_fn=cache.batch, num_workers=1,
                                             multiprocessing_context=start))
    assert all(equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bad", [(0, 1, 2), (3, 4, 5), (6,)])
def test_a_shard_without_images(bad, models, tmp_path):
    root, kept = photos(tmp_path / "photos", 7, bad=bad), [i for i in range(7) if i not in bad]
    cache, whole = cached(root, models, tmp_path / "latents"), image_folder(folder_config(root))
    assert 0 in [e["images"] for e in cache.facts["shards"]] and len(cache) == len(kept) and torch.equal(
        cache.labels, whole.labels[kept])
    coder = load_vae(str(models / "vae"))
    assert torch.allclose(cache.batch(torch.arange(len(kept)))["images"],
                          SCALE * (coder.moments(torch.stack([whole.image(i) for i in kept]))[:, :4] - SHIFT),
                          atol=1e-5)


@pytest.mark.parametrize("conditional", [True, False])
def test_a_cache_of_no_images(conditional, models, tmp_path):
    root = photos(tmp_path / "photos", 4, bad=range(4))
    with pytest.raises(BadInput, match="none of the 4 images|can be read|no images"):
        cached(root, models, tmp_path / "latents", conditional=conditional)


def test_the_limit_holds_for_the_whole_cache(models, tmp_path):
    root = photos(tmp_path / "photos", 9, bad=(0, 4, 8))
    for _ in range(2):    # running it again does not help
        with pytest.raises(BadInput,
                           match="3 images cannot be read, more than data.max_bad_images, 2; the first, cat/00.png"):
            cached(root, models, tmp_path / "latents", max_bad_images=2)
    assert len(cached(root, models, tmp_path / "latents", max_bad_images=3)) == 6


def test_any_file_name_can_be_cached(models, tmp_path):
    root = photos(tmp_path / "photos", 3, ("Katze ü", "𝔡og"))
    os.rename(root / "Katze ü" / "00.png", os.fsencode(root / "Katze ü") + b"/\xff.png")     # not UTF-8
    noise_image(5).save(root / "𝔡og" / "a\nb.png")
    assert len(cached(root, models, tmp_path / "latents")) == 4


@pytest.mark.parametrize("workers", [0, 2, None])
def test_workers_write_the_same_cache(workers, models, tmp_path):
    root = photos(tmp_path / "photos", 7, bad=(2,))
    cached(root, models, tmp_path / "latents", num_workers=workers), cached(root, models, tmp_path / "whole")
    assert content(tmp_path / "latents") == content(tmp_path / "whole")
