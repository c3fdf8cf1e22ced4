"Zip and tar files, and WebDataset's shards, are read where they lie, as the folder that was packed."
import io
import json
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from test_data import encoded, equal, folder_config, no_hub, noise_image, one_line, photos  # noqa: F401

from dmp_wb.core.errors import BadInput
from dmp_wb.data.archives import contents, member_runs, members
from dmp_wb.data.folders import SkippedImages
from dmp_wb.data.images import BadImage
from dmp_wb.data.load import load_data
from dmp_wb.data.tables import load_images


def packed(folder, archive, kind=zipfile.ZIP_DEFLATED, prefix=""):
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", kind) as z:
            for f in files: z.write(f, prefix + f.relative_to(folder).as_posix())
    else:
        with tarfile.open(archive, "w") as t:
            for f in reversed(files): t.add(f, prefix + f.relative_to(folder).as_posix())
    return archive


def shard(path, samples):
    "A shard of samples: (key, {suffix: bytes})."
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as t:
        for key, files in samples:
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))
    return path


def png(seed): return encoded(noise_image(seed), "PNG")


@pytest.mark.parametrize("name,kind,prefix", [
    ("a.zip", zipfile.ZIP_STORED, ""), ("a.zip", zipfile.ZIP_DEFLATED, "photos/"), ("a.tar", None, "./"),
    ("a.tar", None, "photos/")])
def test_an_archive_is_the_folder_that_was_packed(name, kind, prefix, tmp_path):
    root = photos(tmp_path / "photos", 7, bad=(2,))
    for file in root.rglob("*.png"): file.with_suffix(".txt").write_text(f"number {file.stem}")
    archive = packed(root, tmp_path / name, kind, prefix)
    folder, data = (load_images(folder_config(p, caption_column="txt")) for p in (root, archive))
    assert (len(data), data.class_names, data.labels.tolist()) == (7, folder.class_names, folder.labels.tolist())
    order, flip = torch.tensor([6, 2, 0, 3, 3, 1, 5, 4]), torch.arange(8) % 2 == 0
    take = lambda data: SkippedImages(1, lambda line: None).take(data.batch(order, flip))
    assert equal(take(folder), take(data)) and equal(take(folder), take(pickle.loads(pickle.dumps(data))))
    assert [data.names(i) for i in range(7)] == [folder.names(i) for i in range(7)]


def test_splits_and_metadata_of_an_archive_are_those_of_the_folder(tmp_path):
    root = photos(tmp_path / "photos", 4, ("test", "train"))
    (root / "metadata.csv").write_text("file_name,text,kind\n" + "".join(
        f"{'test' if i < 2 else 'train'}/{i:02d}.png,text {i},{'xyxy'[i]}\n" for i in range(4)))
    archive = packed(root, tmp_path / "photos.zip")
    for split in ("train", "test", "all"):
        for words in ({}, dict(caption_column="text"), dict(label_column="kind")):
            folder, data = (load_images(folder_config(p, split=split, **words)) for p in (root, archive))
            everything = torch.arange(len(folder))
            assert len(data) == len(folder) and equal(folder.batch(everything), data.batch(everything))
    with pytest.raises(BadInput, match="unknown data.caption_column 'texts': did you mean 'text'"):
        load_images(folder_config(archive, caption_column="texts"))


def test_processes_read_one_archive_at_once(tmp_path):
    archive = packed(photos(tmp_path / "photos", 40), tmp_path / "photos.zip")
    data = load_images(folder_config(archive))
    parts = [torch.arange(i, 40, 4) for i in range(4)]
    class Parts(torch.utils.data.Dataset):
        def __len__(self): return 4
        def __getitem__(self, i): return data.batch(parts[i])["images"]
    read = torch.cat(list(torch.utils.data.DataLoader(Parts(), batch_size=None, num_workers=2)))
    assert torch.equal(read, data.batch(torch.cat(parts))["images"])


def test_an_image_that_is_damaged_in_its_archive_is_passed_over(tmp_path):
    archive = packed(photos(tmp_path / "photos", 3, None), tmp_path / "photos.zip", zipfile.ZIP_STORED)
    content = bytearray(archive.read_bytes())
    at = content.index(png(1)[:60])
    content[at + 40] ^= 1
    archive.write_bytes(bytes(content))
    said = []
    batch = SkippedImages(1, said.append).take(load_images(folder_config(archive)).batch(torch.tensor([1])))
    assert len(batch["images"]) == 1 and said == ["skipped image 1: 01.png is damaged or cut off in its archive"]


def test_what_no_archive_can_be_read_from_is_refused_in_one_line(tmp_path):
    root = photos(tmp_path / "photos", 3, None)
    packed(root, tmp_path / "bzip.zip", zipfile.ZIP_BZIP2)
    whole = packed(root, tmp_path / "whole.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:len(whole) // 2])
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as t: t.add(root / "00.png", "00.png")
    locked = bytearray(packed(root, tmp_path / "locked.zip").read_bytes())
    locked[locked.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(bytes(locked))
    (tmp_path / "empty.zip").write_bytes(b"PK\5\6" + bytes(18))
    (tmp_path / "images.rar").write_bytes(b"Rar!")
    for name, why in (("bzip.zip", "packed by method 12: expected stored or deflated"),
                      ("cut.zip", "cannot be read as an archive"), ("gz.tar", "a .tar that is not compressed"),
                      ("locked.zip", "which has a password"), ("empty.zip", "holds no images"),
                      ("images.rar", "a file: expected a folder of images, or a .zip or .tar of one")):
        with pytest.raises(BadInput, match=why) as e: load_data(folder_config(tmp_path / name))
        assert one_line(e) and name in str(e.value)


def test_names_that_lead_out_of_an_archive_are_left_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        for name in ("../out.png", "/root.png", "in.png", ".hidden.png", "__MACOSX/in.png", "a/./b.png"):
            z.writestr(name, png(0))
    assert list(members(tmp_path / "a.zip")) == ["in.png"]
    assert list(member_runs(tmp_path / "a.zip")) == [("", ["in.png"])]
    with pytest.raises(BadImage, match="does not exist"): contents(tmp_path / "a.zip" / ".." / "in.png" / "x")
    assert contents(tmp_path / "a.zip" / "in.png") == png(0)
    folder = tmp_path / "b.zip"   # a folder of such a name is a folder
    folder.mkdir()
    (folder / "c.png").write_bytes(png(1))
    assert contents(folder / "c.png") == folder / "c.png" and len(load_images(folder_config(folder))) == 1


def test_an_archive_that_has_changed_is_read_anew(tmp_path):
    archive = packed(photos(tmp_path / "photos", 3, None), tmp_path / "photos.zip")
    assert len(members(archive)) == 3
    packed(photos(tmp_path / "photos", 5, None), archive)
    os.utime(archive, (1, 1))
    assert len(members(archive)) == 5


# --- shards

FLOWERS = ("rose", "aster", "rose", "lily", "rose", "aster")


def shards(root, number=6, per_shard=2, labels=FLOWERS, names="train-{:03d}.tar"):
    for s in range(number // per_shard):
        shard(root / names.format(s), [
            (f"{i:06d}", {"png": png(i), "cls": labels[i].encode(), "txt": f"a {labels[i]}\n".encode(),
                          "json": json.dumps({"caption": f"no. {i}", "number": i}).encode()})
            for i in range(s * per_shard, (s + 1) * per_shard)])
    return root


def test_shards_of_webdataset_are_images_with_words_beside_them(tmp_path):
    root = shards(tmp_path / "flowers")
    data = load_images(folder_config(root, caption_column="txt"))
    assert data.class_names == ["aster", "lily", "rose"] and data.labels.tolist() == [2, 0, 2, 1, 2, 0]
    batch = data.batch(torch.tensor([5, 0]))
    assert batch["captions"] == ["a aster", "a rose"] and data.names(5) == "train-002.tar/000005.png"
    assert np.array_equal(data.cropped(3), load_images(folder_config(
        photos(tmp_path / "same", 6, None))).cropped(3))
    of_json = load_images(folder_config(root, caption_column="caption", label_column="number"))
    assert of_json.batch(torch.tensor([4]))["captions"] == ["no. 4"] and of_json.labels.tolist() == list(range(6))
    assert load_images(folder_config(root, conditional=False)).labels is None
    one = load_images(folder_config(root / "train-001.tar"))   # a shard alone
    assert len(one) == 2 and one.class_names == ["lily", "rose"]


def test_shards_have_splits_by_their_names_and_share_the_classes_of_train(tmp_path):
    root = shards(tmp_path / "flowers")
    shard(root / "val-000.tar", [("x", {"jpg": png(9), "cls": b"rose"})])
    train, val = (load_images(folder_config(root, split=split)) for split in ("train", "val"))
    assert len(train) == 6 and val.class_names == train.class_names and val.labels.tolist() == [2]
    assert len(load_images(folder_config(root, split="all"))) == 7
    shard(root / "val-000.tar", [("x", {"jpg": png(9), "cls": b"tulip"})])
    with pytest.raises(BadInput, match="class 'tulip' in split 'val', but not in train") as e:
        load_images(folder_config(root, split="val"))
    assert one_line(e)


def test_classes_that_are_numbers_in_shards_are_numbers(tmp_path):
    root = shards(tmp_path / "flowers", labels=[str(i) for i in (3, 0, 3, 1, 3, 0)])
    data = load_images(folder_config(root))
    assert data.class_names == ["0", "1", "2", "3"] and data.labels.tolist() == [3, 0, 3, 1, 3, 0]


def test_folders_in_shards_are_classes_where_nothing_else_tells_them(tmp_path):
    shard(tmp_path / "s" / "0.tar", [("cat/1", {"png": png(0)})])
    shard(tmp_path / "s" / "1.tar", [("cat/2", {"png": png(1)}), ("dog/1", {"png": png(2)})])
    data = load_images(folder_config(tmp_path / "s"))
    assert data.class_names == ["cat", "dog"] and data.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("change,why", [
    (dict(caption_column="words"), "unknown data.caption_column 'words'"),
    (dict(label_column="kind"), "unknown data.label_column 'kind'"),
    (dict(caption_column="text"), "unknown data.caption_column 'text': did you mean 'txt'"),
])
def test_what_shards_do_not_hold_is_refused_in_one_line(change, why, tmp_path):
    with pytest.raises(BadInput, match=why) as e: load_images(folder_config(shards(tmp_path / "flowers"), **change))
    assert one_line(e)


def test_a_sample_without_a_class_is_named(tmp_path):
    root = shards(tmp_path / "flowers")
    shard(root / "train-003.tar", [("late", {"png": png(1)})])
    with pytest.warns(UserWarning, match=r"1 of the 7 images .* no \.cls file"), pytest.raises(
            BadInput, match="the label of train-003.tar/late.png is missing: expected one for every image"):
        load_images(folder_config(root))
