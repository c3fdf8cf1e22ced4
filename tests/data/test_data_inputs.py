"Odd image files, suffixes, special files, pickles, and data in workers that are spawned."
import os
import pickle
import socket
import struct
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, features
from test_data import (IMAGES, cached, captioned, encoded, equal, folder_config, models, no_hub,  # noqa: F401
                       noise_image, one_line, photos, quiet, saved)

from dmp_wb.core.errors import BadInput
from dmp_wb.data.cache import ConsecutiveBatches
from dmp_wb.data.folders import image_folder, SkippedImages
from dmp_wb.data.images import BadImage, read_image
from dmp_wb.data.load import load_data
from dmp_wb.data.tables import load_images
from dmp_wb.evaluation.images import data_images, open_samples


# --- suffixes

OTHER_FORMATS = {".jfif": "JPEG", ".jpe": "JPEG", ".avif": "AVIF", ".jp2": "JPEG2000", ".j2k": "JPEG2000",
                 ".tga": "TGA", ".webp": "WEBP", ".bmp": "BMP", ".dib": "DIB", ".tif": "TIFF", ".TIFF": "TIFF",
                 ".apng": "PNG", ".pbm": "PPM", ".pnm": "PPM", ".pcx": "PCX", ".qoi": "QOI", ".sgi": "SGI",
                 ".ico": "ICO", ".dds": "DDS", ".icns": "ICNS"}


@pytest.mark.parametrize("suffix", OTHER_FORMATS)
def test_an_image_of_any_usual_suffix_is_read(suffix, tmp_path):
    if suffix == ".avif" and not features.check("avif") or suffix[:3] == ".j2" and not features.check("jpg_2000"):
        pytest.skip("Pillow was built without")
    image = noise_image(0, 32, 32)
    (tmp_path / f"a{suffix}").write_bytes(encoded(image, OTHER_FORMATS[suffix]))
    data = image_folder(folder_config(tmp_path))
    assert (len(data) == 1
            and SkippedImages(0, quiet).take(data.batch(torch.tensor([0])))["images"].shape == (1, 3, 8, 8))
    assert open_samples(tmp_path).num_images == 1


def test_an_image_that_pillow_cannot_read_here_is_named_and_counted(tmp_path):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64)
    root = photos(tmp_path / "photos", 3, None)
    for name in ("x.heic", "y.heif", "z.jxl"): (root / name).write_bytes(heic)
    data, said = image_folder(folder_config(root)), []
    skipped = SkippedImages(3, said.append)
    skipped.take(data.batch(torch.arange(6)))
    assert (len(data) == 6 and len(skipped.found) == 3
            and "x.heic is no image that Pillow can read; .heic needs the package pillow-heif" in said[0])
    with pytest.raises(BadInput, match="3 images cannot be read, more than data.max_bad_images, 2"):
        SkippedImages(2, quiet).take(image_folder(folder_config(root)).batch(torch.arange(6)))


def test_a_folder_of_images_that_pillow_cannot_read_is_refused_at_once(tmp_path):
    for n in range(3): (tmp_path / f"{n}.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    with pytest.raises(BadInput, match="holds no image that can be read: none of 3; the last, 2.heic, is no image that "
                       "Pillow can read") as error:
        load_data(folder_config(tmp_path))
    assert one_line(error)
    (tmp_path / "0.heic").write_bytes(encoded(IMAGES[0], "JPEG"))   # telephones name them so
    assert len(load_data(folder_config(tmp_path))) == 3


def test_files_that_are_left_out_are_named(tmp_path):
    root = photos(tmp_path / "photos", 2, None)
    for name in ("a.svg", "b.svg", "c.dng", "readme.txt", "LICENSE", "metadata.csv"): (root / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"holds 3 files that are left out, since their suffixes are of no image that "
                      r"is read: 2 × .svg, 1 × .dng; the first, a.svg"):
        image_folder(folder_config(root))
    for file in root.glob("*.png"): file.unlink()
    with pytest.raises(BadInput,
                       match=r"holds no images: expected files ending in .png, .*; it holds 2 × .svg, 1 × .dng"):
        image_folder(folder_config(root))


# --- odd files

def png(width, height, data=b""):
    "A PNG of any size that claims it."
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b""))


def archive(kind, tmp_path):
    file = tmp_path / f"archive.{kind}"
    (tmp_path / "inner.png").write_bytes(encoded(IMAGES[0], "PNG"))
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as z: z.write(tmp_path / "inner.png", "inner.png")
    else:
        with tarfile.open(file, "w") as t: t.add(tmp_path / "inner.png", "inner.png")
    return file.read_bytes()


ODD = {
    "a bomb": lambda _: png(60000, 60000), "a larger bomb": lambda _: png(2**31 - 1, 2**31 - 1),
    "no width": lambda _: png(0, 5), "no pixels": lambda _: b"P6 0 0 255\n",
    "no pixels, bmp": lambda _: encoded(Image.new("RGB", (1, 1)), "BMP").replace(
        struct.pack("<ii", 1, 1), struct.pack("<ii", 0, 0)), "no pixels, gif": lambda _: b"GIF89a\0\0\0\0\0\0\0;",
    "truncated": lambda _: encoded(noise_image(0, 200, 200), "JPEG")[:2000], "a zip": lambda tmp: archive("zip", tmp),
    "a tar": lambda tmp: archive("tar", tmp), "a pickle": lambda _: pickle.dumps([1, 2, 3]),
    "PostScript": lambda _: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
    "a page": lambda _: b"<!doctype html><title>404</title>",
    "text that is decompressed": lambda _: png(8, 8, bytes(200))[:-12]
    + (lambda body: struct.pack(">I", len(body)) + b"zTXt" + body
       + struct.pack(">I", zlib.crc32(b"zTXt" + body)))(b"a\0\0" + zlib.compress(bytes(10**7))) + png(8, 8)[-12:],
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_file_is_a_bad_image(case, tmp_path):
    content = ODD[case](tmp_path)
    root = photos(tmp_path / "photos", 2, None)
    (root / "odd.png").write_bytes(content)
    data, said = image_folder(folder_config(root)), []
    assert len(SkippedImages(1, said.append).take(data.batch(torch.arange(3)))["images"]) == 3
    assert len(said) == 1 and said[0].startswith("skipped image 1: odd.png ") and "\n" not in said[0]
    with pytest.raises(BadImage): read_image(content)


def test_postscript_is_never_shown(monkeypatch):
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript",
                        lambda *args, **kwargs: pytest.fail("a program was run for a file"))
    with pytest.raises(BadImage, match="is no image that Pillow can read"): read_image(ODD["PostScript"](None))


SPECIAL = {"a pipe": os.mkfifo, "a device": lambda p: os.symlink("/dev/zero", p), "a socket": lambda p: bind(p),
           "a folder": lambda p: os.mkdir(p)}


def bind(path):
    here = os.getcwd()
    os.chdir(path.parent)   # a socket's whole path has 108 bytes at most
    try: socket.socket(socket.AF_UNIX).bind(path.name)
    finally: os.chdir(here)


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_is_never_opened(kind, tmp_path):
    root = photos(tmp_path / "photos", 2, None)
    SPECIAL[kind](root / "0special.png")
    for source in (root / "0special.png", str(root / "0special.png")):
        with pytest.raises(BadImage, match="is a folder, a pipe, a socket or a device: expected a regular file"):
            read_image(source)
    if kind == "a folder": return
    said = []
    SkippedImages(1, said.append).take(image_folder(folder_config(root)).batch(torch.arange(3)))
    assert said == ["skipped image 1: 0special.png is a folder, a pipe, a socket or a device: expected a regular file"]
    assert data_images(folder_config(root)).fingerprint()   # for the cache of statistics
    SPECIAL[kind](root / "metadata.csv")
    with pytest.raises(BadInput, match="metadata.csv is a pipe, a socket or a device: expected regular files "
                       "only|0special.png is a pipe"):
        load_images(folder_config(root, caption_column="text"))


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json", "extra.arrow"])
def test_a_pipe_in_a_saved_data_set_is_refused(name, tmp_path):
    root = Path(saved(tmp_path, {"image": IMAGES}))
    (root / name).unlink(missing_ok=True)
    os.mkfifo(root / name)
    with pytest.raises(BadInput, match=f"{name} is a pipe, a socket or a device: expected regular files only"):
        load_data(folder_config(root))


def test_a_pipe_as_data_is_refused(tmp_path):
    os.mkfifo(tmp_path / "data")
    with pytest.raises(BadInput, match="expected a folder of images"): load_data(folder_config(tmp_path / "data"))


class Trap:
    def __reduce__(self): return Path.touch, (Path(os.environ["TRAP"]),)


@pytest.mark.parametrize("kind", ["pkl", "tar", "parquet", "arrow", "png", "json"])
def test_nothing_pickled_is_loaded(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    evil, root = pickle.dumps(Trap()), tmp_path / "received"
    root.mkdir()
    if kind == "tar":
        with tarfile.open(root / "train.tar", "w") as t:
            for name in ("0.pkl", "0.pyd", "0.npy", "0.pth"):
                (tmp_path / name).write_bytes(evil if name != "0.npy" else npy())
                t.add(tmp_path / name, name)
    elif kind in ("parquet", "arrow"):
        ds = datasets.Dataset.from_dict({"image": [evil] * 2, "label": [evil] * 2})
        ds.to_parquet(str(root / "train.parquet")) if kind == "parquet" else ds.save_to_disk(root)
    else: (root / f"train.{kind}").write_bytes(evil)
    for caption in (None, "label"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(BadInput) as error:
                load_images(folder_config(root, caption_column=caption)).batch(torch.arange(1))
        assert one_line(error)
    assert not (tmp_path / "sprung").exists()


def npy():
    import io
    file = io.BytesIO()
    np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("name,content",
                         [("train.parquet", b"PAR1" + bytes(40)), ("train.arrow", b"ARROW1"), ("train.tar", b"no tar"),
                          ("data.zip", b"PK no zip"), ("train.json", b"[" * 50000), ("train.csv", b"\xff\xfe\0")])
def test_odd_tables_and_archives_are_one_line(name, content, tmp_path):
    (tmp_path / "received").mkdir()
    (tmp_path / "received" / name).write_bytes(content)
    with pytest.raises(BadInput) as error: load_images(folder_config(tmp_path / "received", caption_column="text"))
    assert one_line(error) and len(str(error.value)) < 600


@pytest.mark.parametrize("file", ["dataset_info.json", "state.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 100000, b'{"features": 7}',
                                     b'{"_data_files": [{"filename": "../../../etc/hostname"}]}', b"\xff"])
def test_an_odd_saved_data_set_is_one_line(file, content, tmp_path):
    root = Path(saved(tmp_path, {"image": IMAGES}))
    (root / file).write_bytes(content)
    try: load_images(folder_config(root)).batch(torch.arange(4))
    except BadInput as e: assert "\n" not in str(e)


# --- workers

def sources(tmp_path, models):  # noqa: F811
    "A source of each kind, by name."
    root = photos(tmp_path / "photos", 4)
    table = tmp_path / "table" / "train.parquet"
    table.parent.mkdir()
    datasets.Dataset.from_dict({"image": IMAGES, "label": [0, 1, 0, 1],
                                "text": list("abcd")}).cast_column("image", datasets.Image()).to_parquet(str(table))
    notes = photos(tmp_path / "notes", 4, None)
    (notes / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i:02d}.png,a cat\n" for i in range(4)))
    text = dict(caption_column="text", text_encoder=str(models / "clip"))
    return {"digits": load_data("digits"), "folder": load_data(folder_config(root)),
            "saved": load_data(folder_config(saved(tmp_path, {"image": IMAGES, "label": [0, 1, 0, 1]}))),
            "table": load_images(folder_config(table.parent, caption_column="text")),
            "captions": load_images(folder_config(notes, caption_column="text")),
            "text": load_data(folder_config(notes, **text)),
            "encoded": load_data(folder_config(root, vae=str(models / "vae"))),
            "cache": cached(root, models, tmp_path / "latents")}


@pytest.mark.parametrize("start", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_every_source_goes_to_workers_that_are_started_afresh(start, tmp_path, models):  # noqa: F811
    requests, found = [torch.tensor([0, 2]), torch.tensor([3, 1])], sources(tmp_path, models)
    for data in found.values():
        assert equal(pickle.loads(pickle.dumps(data)).batch(requests[0]), data.batch(requests[0]))
    parts = ConsecutiveBatches(load_images(folder_config(saved(tmp_path, {"image": IMAGES}, name="parts"))), range(4),
                               3)
    answers = list(torch.utils.data.DataLoader(requests, batch_size=None, collate_fn=Together(found, parts),
                                               num_workers=1, multiprocessing_context=start))
    for n, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        assert torch.equal(answer.pop("parts"), parts[n][0]["images"])
        assert answer.keys() == found.keys() and all(equal(answer[name], data.batch(request))
                                                     for name, data in found.items())


class Together:
    "A batch of every source: one start of a worker for all of them."
    def __init__(self, sources, parts): self.sources, self.parts = sources, parts
    def __call__(self, indices):
        return {name: data.batch(indices) for name, data in self.sources.items()} | {
            "parts": self.parts[int(indices[0] == 3)][0]["images"]}


def test_no_setting_is_taken_from_the_first_image(tmp_path):
    for first in ("L", "RGB", "RGBA"):
        root = tmp_path / first
        root.mkdir()
        for i, mode in enumerate([first, "RGB", "L", "RGBA"]): noise_image(i, mode=mode).save(root / f"{i}.png")
        assert image_folder(folder_config(root)).batch(torch.arange(4))["images"].shape == (4, 3, 8, 8)
        assert data_images(folder_config(root)).shape == (3, 8, 8)
