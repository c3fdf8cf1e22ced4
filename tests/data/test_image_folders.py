"How folders are listed, and images put into batches: the same names and pixels as by the plain way."
import os
import pickle
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from test_data import encoded, equal, folder_config, models, no_hub, noise_image, on_its_side, photos, saved  # noqa: F401

from dmp_wb.data import images as data_images
from dmp_wb.data.folders import FileNames, _all_files, image_files, image_folder
from dmp_wb.data.images import centre_crop, IMAGE_SUFFIXES, put_pixels, read_image, to_tensor
from dmp_wb.data.load import load_data
from dmp_wb.data.sources import digits, ImageData


# --- pixels

def plainly_cropped(image, size):
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def mosaic(rng, width, height, mode, hard):
    pixels = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    if hard: pixels = (pixels > 127).astype(np.uint8) * 255   # overshoots at every edge
    return Image.fromarray(pixels.squeeze(-1) if len(mode) == 1 else pixels, mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK"])
def test_a_crop_has_the_pixels_of_resizing_everything(mode):
    rng = np.random.default_rng(len(mode))
    shapes = [tuple(map(int, rng.integers(1, 200, 2))) for _ in range(150)]
    shapes += [(w, int(w * f) + 1) for w in range(20, 140, 7) for f in (1, 1.2, 1.4, 1.5, 1.6)]
    for n, (width, height) in enumerate(shapes):
        image, size = mosaic(rng, width, height, mode, n % 3 == 0), int(rng.integers(1, 90))
        assert centre_crop(image, size) == plainly_cropped(image, size), (image.size, size)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_in_their_place_are_those_of_a_tensor(mode):
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert(mode)
    place = np.empty((len(mode), 16, 16), np.float32)
    put_pixels(image, place)
    assert np.array_equal(place, to_tensor(image).numpy()) and place.min() == -1 and place.max() == 1
    for wrong in (image.resize((15, 16)), image.convert("L" if mode == "RGB" else "RGB")):
        with pytest.raises(ValueError, match="expected one for"): put_pixels(wrong, place)


def test_a_batch_is_its_images_and_mirrors_those_that_are_chosen(tmp_path):
    root = photos(tmp_path / "photos", 5)
    (root / "cat" / "99.jpg").write_bytes(on_its_side())
    flip = torch.tensor([True, False, False, True, True, False])
    for channels in (3, 1):
        files = image_folder(folder_config(root, channels=channels))
        one_by_one = torch.stack([files.image(i) for i in range(6)])
        batch = files.batch(torch.arange(6))["images"]
        assert torch.equal(batch, one_by_one) and batch.is_contiguous() and batch.dtype == torch.float32
        mirrored = torch.where(flip[:, None, None, None], one_by_one.flip(-1), one_by_one)
        assert torch.equal(files.batch(torch.arange(6), flip)["images"], mirrored)
        in_memory, kept = ImageData(one_by_one.clone(), None, []), one_by_one.clone()
        assert torch.equal(in_memory.batch(torch.arange(6), flip)["images"], mirrored)
        assert torch.equal(in_memory.images, kept)   # mirrored in the batch, not in the data


def test_an_image_is_turned_only_where_its_tag_says_so_and_never_copied_for_nothing(monkeypatch):
    turned, copied = [], []
    turn, copy = ImageOps.exif_transpose, Image.Image.copy
    monkeypatch.setattr(data_images.ImageOps, "exif_transpose", lambda image: turned.append(image) or turn(image))
    monkeypatch.setattr(Image.Image, "copy", lambda image: copied.append(image) or copy(image))
    upright = encoded(noise_image(0, 32, 32), "JPEG")
    centre_crop(read_image(upright), 32)
    assert not turned and not copied
    assert read_image(on_its_side()).size == (20, 24) and len(turned) == 1


# --- names

def walked(root):
    "The files below a folder as os.walk finds them, in order: what the list must be."
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        above = {os.path.realpath(p) for p in (Path(folder), *Path(folder).parents)}
        folders[:] = [f for f in folders
                      if not f.startswith(".") and os.path.realpath(os.path.join(folder, f)) not in above]
        found += [(Path(folder) / f).relative_to(root).as_posix() for f in files if not f.startswith(".")]
    return sorted(found)


@pytest.fixture
def odd_tree(tmp_path):
    root = tmp_path / "root"
    for name in ("b/2.png", "a.png", "b-1.png", "b.png", "b0.PNG", "b/c/3.jpg", "b/c-/4.jpg", "b/c.jpg", "z/0.png",
                 ".hidden/5.png", "b/.6.png", "notes.txt", "b/notes", "b/movie.mp4", "ä/ü.png", "ä/dot.", "z/x.y.gif"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    with open(os.path.join(os.fsencode(root), b"b", b"\xff\xe4.png"), "wb"): pass
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    for file in ("elsewhere/1.png", "elsewhere/deep/2.png"): (tmp_path / file).touch()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "circle").symlink_to(root)
    (root / "b" / "up").symlink_to(root / "b")
    (root / "broken.png").symlink_to(root / "nowhere")
    (root / "a-file.png").symlink_to(root / "a.png")
    return root


def test_a_folder_is_listed_as_it_was_walked(odd_tree, monkeypatch):
    expected = walked(odd_tree)
    assert [p.relative_to(odd_tree).as_posix() for p in _all_files(odd_tree)] == expected
    pictures = [f for f in expected if f.lower().endswith(IMAGE_SUFFIXES)]
    assert [p.relative_to(odd_tree).as_posix() for p in image_files(odd_tree)] == pictures and len(pictures) > 15
    monkeypatch.chdir(odd_tree)
    assert [p.as_posix() for p in _all_files(Path("."))] == walked(".")
    assert list(_all_files(Path("nowhere"))) == []
    with pytest.warns(UserWarning, match="1 files .*: 1 × .mp4; the first, b/movie.mp4"):
        data = image_folder(folder_config(odd_tree, conditional=False))
    assert [os.fsdecode(data.read(i)) for i in range(len(data))] == [str(odd_tree / f) for f in pictures]
    assert [n for n in map(data.names, range(len(data))) if "xff" in n] == [r"b/\xff\xe4.png"]


def test_the_first_of_what_is_left_out_is_that_of_the_first_folder(tmp_path):
    for name in ("a-b/1.mp4", "a/2.mp4", "a/3.mov", "a/0.png"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    with pytest.warns(UserWarning, match="holds 3 files that are left out, .*: 2 × .mp4, 1 × .mov; the first, a/2.mp4"):
        image_folder(folder_config(tmp_path / "root", conditional=False))


def test_names_are_a_sequence_in_one_buffer():
    runs = [("", ["a.png"]), ("b", ["1.png", "ü.png"]), ("", ["c.png"]), ("d/e", ["1.png"] * 1000)]
    names = FileNames.of(runs)
    expected = [f"{folder}/{n}" if folder else n for folder, of_run in runs for n in of_run]
    assert list(names) == expected == [names[i] for i in range(len(names))] and names[-1] == "d/e/1.png"
    with pytest.raises(IndexError): names[len(names)]
    assert names.buffer.count(b"\0") == 1004 and len(pickle.dumps(names)) < 16 * 1004
    assert list(names.only(lambda folder: folder != "b")) == [n for n in expected if not n.startswith("b/")]
    for none in (FileNames.of([]), names.only(lambda folder: False)): assert list(none) == [] and not len(none)
    assert list(pickle.loads(pickle.dumps(names))) == expected


def test_classes_and_labels_are_those_of_the_folders(tmp_path):
    root = photos(tmp_path / "photos", 9, ("cat", "dog", "cat/sleeping", "ant"))
    data = image_folder(folder_config(root))
    assert data.class_names == ["ant", "cat", "dog"] and data.labels.dtype == torch.int64
    assert [data.class_names[n] for n in data.labels] == [data.names(i).split("/")[0] for i in range(9)]


# --- readers in other processes

def test_readers_pickle(tmp_path, models):  # noqa: F811
    root = photos(tmp_path / "photos", 6, bad=(2,))
    (root / "cat" / "metadata.csv").write_text("file_name,text\n00.png,a cat\n01.png,two cats\n")
    table = saved(tmp_path, {"image": [noise_image(i) for i in range(4)], "label": [0, 1, 0, 1]},
                  {"label": datasets.ClassLabel(names=["x", "y"])})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sources = [digits(), image_folder(folder_config(root)), load_data(folder_config(table)),
                   load_data(folder_config(root, caption_column="text", text_encoder=str(models / "clip"))),
                   load_data(folder_config(root, size=16, vae=str(models / "vae")))]
    for source in sources:
        order = torch.tensor([0, 1])
        again = pickle.loads(pickle.dumps(source))
        assert len(again) == len(source) and equal(again.batch(order), source.batch(order))
