"Folders named as splits, `data.split`, and captioned folders whatever their files are called."
import json
import warnings
from pathlib import Path

import datasets
import pytest
import torch
from test_data import IMAGES, cached, equal, folder_config, models, no_hub, noise_image, one_line, quiet  # noqa: F401

from dmp_wb.core.errors import BadInput
from dmp_wb.core.settings import DataConfig
from dmp_wb.data.cache import LatentCache
from dmp_wb.data.folders import folder_splits, image_folder, SkippedImages, split_kind
from dmp_wb.data.images import centre_crop, to_tensor
from dmp_wb.data.load import load_data
from dmp_wb.data.tables import load_images, only_split
from dmp_wb.evaluation.images import data_images
from dmp_wb.evaluation.statistics import reference_statistics


def tree(root, *files):
    "A folder of small images, each of its own."
    for i, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        noise_image(i, 8, 8).save(root / file)
    return root


def names(data): return [data.names(i) for i in range(len(data))]


def labelled(data): return {data.names(i): data.class_names[data.labels[i]] for i in range(len(data))}


LAYOUTS = {   # files; what each split holds, and of which classes
    "flat splits": (["train/0.png", "train/1.png", "test/2.png"], {"train": 2, "test": 1}, []),
    "splits of classes": (["train/cat/0.png", "train/dog/1.png", "val/dog/2.png"],
                          {"train": 2, "val": 1, "validation": 1, "dev": 1}, ["cat", "dog"]),
    "classes of splits": (["cat/train/0.png", "cat/test/1.png", "dog/train/2.png"], {"train": 2, "test": 1},
                          ["cat", "dog"]),
    "capitals": (["Train/a/0.png", "TEST/a/1.png"], {"train": 1, "Test": 1, "test": 1, "TEST": 1}, ["a"]),
    "other words": (["training/a/0.png", "evaluation/a/1.png", "dev/a/2.png"],
                    {"train": 1, "test": 1, "validation": 1, "dev": 1}, ["a"]),
    "years": (["train2017/0.png", "train2017/1.png", "val2017/2.png"],
              {"train": 2, "train2017": 2, "val2017": 1, "val": 1}, []),
    "sets": (["training_set/cats/0.png", "test_set/cats/1.png", "test_set/cats/2.png"], {"train": 1, "test": 2},
             ["cats"]),
    "one split": (["train/a/0.png", "train/b/1.png"], {"train": 2}, ["a", "b"]),
    "a class called train": (["train/train/0.png", "train/bus/1.png", "val/train/2.png"], {"train": 2, "val": 1},
                             ["bus", "train"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_named_as_splits_are_splits(layout, tmp_path):
    files, sizes, classes = LAYOUTS[layout]
    root = tree(tmp_path / "photos", *files)
    for split, size in sizes.items():
        data = load_data(folder_config(root, split=split))
        assert len(data) == size and data.class_names == classes, split
        assert len(load_data(folder_config(root, split=split, conditional=False))) == size
        if classes: assert all(f"/{name}/" in f"/{file}" for file, name in labelled(data).items())
    assert len(load_data(folder_config(root, split="all"))) == len(files)
    with pytest.raises(BadInput, match="unknown data.split 'tset': .*known: ") as error:
        load_data(folder_config(root, split="tset"))
    known = {part.casefold() for f in files for part in f.split("/")[:-1] if split_kind(part)}
    assert one_line(error) and str(error.value).split("known: ")[1].split(", ") == sorted(known)


def test_training_takes_the_training_split_and_a_distance_the_one_that_is_named(tmp_path):
    root = tree(tmp_path / "photos", "train/0.png", "train/1.png", "train/2.png", "test/3.png")
    held_out = to_tensor(centre_crop(noise_image(3, 8, 8), 8))
    assert not any(torch.equal(x, held_out) for x in load_data(folder_config(root)).batch(torch.arange(3))["images"])
    images = data_images(folder_config(root, split="test"))
    assert images.num_images == 1 and torch.equal(next(iter(images.batches(4)))[0], held_out)
    assert (
        data_images(folder_config(root, split="test")).fingerprint() != data_images(folder_config(root)).fingerprint())
    with pytest.raises(BadInput, match="unknown data.split 'validation': .*known: test, train"):
        data_images(folder_config(root, split="validation"))


def test_a_class_has_one_number_in_every_split(tmp_path):
    root = tree(tmp_path / "photos", "train/a/0.png", "train/b/1.png", "test/b/2.png")
    test = load_data(folder_config(root, split="test"))
    assert test.class_names == ["a", "b"] and test.labels.tolist() == [1]
    tree(root, "test/c/3.png")
    with pytest.raises(BadInput, match="holds class c in split test, but not in train: expected the classes of train"):
        load_data(folder_config(root, split="test"))
    assert load_data(folder_config(root)).class_names == ["a", "b"]
    assert load_data(folder_config(root, split="all")).class_names == ["a", "b", "c"]


@pytest.mark.parametrize("files,some,other", [
    (["cat/0.png", "dog/1.png", "test/2.png"], "test/", "cat/"), (["bus/0.png", "train/1.png"], "train/", "bus/"),
    (["train/0.png", "test/1.png", "2.png"], "test/", "./"),
    (["train2017/0.png", "val2017/1.png", "extra/2.png"], "train2017/", "extra/"),
    (["cat/0.png", "cat/test/1.png"], "cat/test/", "cat/"),
])
def test_images_of_a_split_beside_images_of_none_are_refused_by_name(files, some, other, tmp_path):
    root = tree(tmp_path / "photos", *files)
    for conditional in (True, False):
        with pytest.raises(BadInput, match="expected all in splits, or none; data.split=all") as error:
            load_data(folder_config(root, conditional=conditional))
        assert some in str(error.value) and other in str(error.value) and one_line(error)
    if "2.png" not in files: assert names(load_data(folder_config(root, split="all"))) == sorted(files)


@pytest.mark.parametrize("classes",
                         [["test-tube", "cat", "dog"], ["train-steam", "train-diesel"],
                          ["bullet train", "test tube", "cat", "dog", "eel"], ["trainer", "developer"], ["cat", "dog"]])
def test_a_class_whose_name_only_begins_like_a_split_is_a_class(classes, tmp_path):
    root = tree(tmp_path / "photos", *(f"{c}/0.png" for c in classes))
    assert load_data(folder_config(root)).class_names == sorted(classes)


def test_a_folder_without_splits_is_the_split_train(tmp_path):
    for root in (tree(tmp_path / "flat", "0.png", "1.png"), tree(tmp_path / "classes", "cat/0.png", "dog/1.png")):
        assert names(load_data(folder_config(root))) == names(load_data(folder_config(root, split="all")))
        with pytest.raises(BadInput, match="unknown data.split 'test': known: train"):
            load_data(folder_config(root, split="test"))


def test_built_in_data_have_one_split():
    assert len(load_data("digits")) == len(load_data(DataConfig(split="all"))) == 1797
    for use in (load_data, data_images):
        with pytest.raises(BadInput, match="digits: unknown data.split 'test': known: train"):
            use(DataConfig(split="test"))


def test_the_splits_of_saved_data_sets(tmp_path):
    ds = datasets.Dataset.from_dict({"image": IMAGES}).cast_column("image", datasets.Image())
    ds.save_to_disk(tmp_path / "none")
    datasets.DatasetDict(train=ds, test=ds.select([3])).save_to_disk(tmp_path / "both")
    datasets.load_from_disk(tmp_path / "both")["test"].save_to_disk(tmp_path / "old")
    named = datasets.Dataset(ds.data, split=datasets.Split.TEST)
    named.save_to_disk(tmp_path / "test")
    sizes = lambda name: {s: len(load_data(folder_config(tmp_path / name, split=s)))
                          for s in ("train", "test", "all", "eval") if works(tmp_path / name, s)}
    assert (sizes("none") == {"train": 4, "all": 4} and sizes("both") == {"train": 4, "test": 1, "all": 5, "eval": 1}
            and sizes("test") == {"test": 4, "all": 4, "eval": 4})
    with pytest.raises(BadInput, match="unknown data.split 'test': known: train"):
        load_data(folder_config(tmp_path / "none", split="test"))
    with pytest.raises(BadInput, match="unknown data.split 'train': known: test"):
        load_data(folder_config(tmp_path / "test"))


def test_a_reference_that_is_named_without_a_split_may_be_saved_as_one(tmp_path):
    ds = datasets.Dataset.from_dict({"image": IMAGES}).cast_column("image", datasets.Image())
    datasets.Dataset(ds.data, split=datasets.Split.TEST).save_to_disk(tmp_path / "test")
    found = reference_statistics(tmp_path / "test", torch.nn.Flatten(), 8, cache=False, quiet=True)
    assert found.num_images == 4 and only_split("digits") == only_split(str(tmp_path)) == "train"


def works(root, split):
    try: return bool(load_data(folder_config(root, split=split)))
    except BadInput: return False


def test_splits_of_different_columns_are_not_joined(tmp_path):
    ds = datasets.Dataset.from_dict({"image": IMAGES}).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=ds, test=ds.add_column("label", [0, 1, 0, 1])).save_to_disk(tmp_path / "saved")
    with pytest.raises(BadInput,
                       match="splits train and test have different columns: expected the same with data.split=all"):
        load_data(folder_config(tmp_path / "saved", split="all"))


def test_tables_of_which_only_some_are_named_as_splits_are_refused(tmp_path):
    ds = datasets.Dataset.from_dict({"image": IMAGES}).cast_column("image", datasets.Image())
    (tmp_path / "mixed").mkdir(), (tmp_path / "good").mkdir()
    for name in ("mixed/a.parquet", "mixed/test.parquet", "good/train.parquet", "good/test-1.parquet"):
        ds.to_parquet(str(tmp_path / name))
    with pytest.raises(BadInput, match="holds a.parquet, of no split, beside test.parquet of split test"):
        load_data(folder_config(tmp_path / "mixed"))
    assert len(load_data(folder_config(tmp_path / "good", split="test"))) == 4
    with pytest.raises(BadInput, match="unknown data.split 'dev': known: test, train"):
        load_data(folder_config(tmp_path / "good", split="dev"))
    tree(tmp_path / "good", "0.png")
    with pytest.raises(BadInput,
                       match="holds images and tables, as 0.png and (train|test-1).parquet: expected one or the other"):
        load_data(folder_config(tmp_path / "good"))


def test_names_that_stand_for_splits():
    assert [split_kind(w) for w in ("training", "VAL", "eval", "train2017", "my test set", "traindata", "latest",
                                    "cat")] == ["train", "validation", "test", "train", "test", None, None, None]
    assert (split_kind("train2017", exact=True) is None and folder_splits(Path("x"), []) == {}
            and folder_splits(Path("x"), ["."]) == {})


# --- captioned folders

def notes(root, rows, file="metadata.csv"):
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    if file.endswith("jsonl"): (root / file).write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif file.endswith("csv"):
        (root / file).write_text("\n".join([",".join(rows[0])] + [",".join(map(str, r.values())) for r in rows]) + "\n")
    else: datasets.Dataset.from_list(rows).to_parquet(str(root / file))
    return root


@pytest.mark.parametrize("file", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
@pytest.mark.parametrize("last",
                         ["e.png", "red train.png", "train.png", "test-tube.png", "dev/val.png", "validation-1.png"])
def test_a_captioned_folder_holds_every_image_that_its_metadata_name(last, file, tmp_path):
    files = ["a.png", "train-1.png", "test-1.png", last]
    if last == "dev/val.png": files = ["a/train.png", "b/test.png", "c/eval.png", "c/val.png"]
    root = notes(tree(tmp_path / "photos", *files),
                 [{"file_name": f, "text": f"picture {i}"} for i, f in enumerate(files)], file)
    data = load_images(folder_config(root, caption_column="text"))
    assert [data.captions(i) for i in range(len(data))] == [f"picture {i}" for i in range(4)]
    assert torch.equal(data.image(3), to_tensor(centre_crop(noise_image(3, 8, 8), 8)))


@pytest.mark.parametrize("where", ["root", "splits"])
def test_the_splits_of_a_captioned_folder_are_its_folders(where, tmp_path):
    files = ["train/a.png", "train/b.png", "test/c.png"]
    root = tree(tmp_path / "photos", *files)
    if where == "root": notes(root, [{"file_name": f, "text": f} for f in files])
    else:
        for split in ("train", "test"):
            notes(root / split, [{"file_name": Path(f).name, "text": f} for f in files if f.startswith(split)])
    def captions(split):
        data = load_images(folder_config(root, split=split, caption_column="text"))
        return [data.captions(i) for i in range(len(data))]
    assert (captions("train") == files[:2] and captions("test") == captions("eval") == files[2:]
            and sorted(captions("all")) == sorted(files))
    with pytest.raises(BadInput, match="unknown data.split 'dev': known: test, train"): captions("dev")


def test_captions_are_what_was_written(tmp_path):
    captions = ["NA", "None", "0012", "1.50", "", "true", "nan"]
    root = tree(tmp_path / "photos", *(f"{i}.png" for i in range(7)))
    notes(root, [{"file_name": f"{i}.png", "text": c, "label": i % 2} for i, c in enumerate(captions)])
    data = load_images(folder_config(root, caption_column="text"))
    assert [data.captions(i) for i in range(7)] == captions and data.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_metadata_leave_images_out_with_a_word_and_name_files_that_are_not_there(tmp_path):
    root = notes(tree(tmp_path / "photos", "a.png", "b.png", "c.png"),
                 [{"file_name": f, "text": f} for f in ("c.png", "gone.png", "")])
    with pytest.warns(UserWarning,
                      match="2 of the 3 images in .* are left out, since no metadata name them; the first, a.png"):
        data = load_images(folder_config(root, caption_column="text"))
    said = []
    SkippedImages(2, said.append).take(data.batch(torch.tensor([1, 2])))
    assert said == ["skipped image 1: row 1 (gone.png) does not exist", "skipped image 2: row 2 is missing (null)"]


METADATA = {   # what is wrong with the metadata: file, content, message
    "not UTF-8": ("metadata.csv", b"file_name,text\n0.png,caf\xe9\n", "metadata.csv is no valid UTF-8: "),
    "not UTF-8, jsonl": ("metadata.jsonl", b'{"file_name": "0.png", "text": "caf\xe9"}\n',
                         "metadata.jsonl is no valid UTF-8: "),
    "torn": ("metadata.jsonl", b'{"file_name": "0.png", "te', "metadata.jsonl is no valid jsonl: "),
    "a list": ("metadata.jsonl", b"[1, 2]\n",
               r"metadata.jsonl holds '\[1, 2\]' as row 0: expected an object with file_name"),
    "deep": ("metadata.jsonl", b"[" * 100000, "metadata.jsonl is no valid jsonl: "),
    "6,000 digits": ("metadata.jsonl", b'{"file_name": "0.png", "text": ' + b"9" * 6000 + b"}",
                     "metadata.jsonl is no valid jsonl: "),
    "an open quote": ("metadata.csv", b'file_name,text\n0.png,"open\n', "metadata.csv is no valid csv: "),
    "more fields": ("metadata.csv", b"file_name,text\n0.png,a\n0.png,a,b,c\n", "metadata.csv is no valid csv: "),
    "empty": ("metadata.csv", b"", "metadata.csv is no valid csv: "),
    "no parquet": ("metadata.parquet", b"PAR1 of course not", "metadata.parquet is no valid parquet: "),
    "no file names": ("metadata.csv", b"name,text\n0.png,a\n",
                      "unknown data.image_column 'image': .*known: name, text"),
    "a number": ("metadata.jsonl", b'{"file_name": "0.png", "text": "a"}\n{"file_name": "0.png", "text": 5}',
                 "data.caption_column 'text' holds '5' in row 1: expected strings"),
    "a late number": ("metadata.jsonl", b'{"file_name": "0.png", "text": "a"}\n' * 20000
                      + b'{"file_name": "0.png", "text": [1]}', "holds '\\[1\\]' in row 20000: expected strings"),
    "mixed labels": ("metadata.jsonl", b'{"file_name": "0.png", "text": "a", "label": 0}\n{"file_name": "0.png", '
                     b'"text": "a", "label": "x"}', "data.label_column 'label' holds values of several types"),
    "no label": ("metadata.csv", b"file_name,text,label\n0.png,a,x\n0.png,a,\n", "the label of row 1 is missing"),
    "huge labels": ("metadata.csv", b"file_name,text,label\n0.png,a," + b"9" * 6000 + b"\n",
                    "data.label_column 'label' holds '9{60}'…, 6,000 characters: expected names of classes"),
    "upwards": ("metadata.csv", b"file_name,text\n../0.png,a\n",
                "file_name of row 0 is '../0.png': expected a path below the folder of metadata.csv"),
    "absolute": ("metadata.csv", b"file_name,text\n/etc/hostname,a\n",
                 "file_name of row 0 is '/etc/hostname': expected a path below"),
    "an address": ("metadata.csv", b"file_name,text\nfile:///etc/hostname,a\n",
                   "expected a path below the folder of metadata.csv"),
    "a number as file": ("metadata.jsonl", b'{"file_name": 7, "text": "a"}\n',
                         "file_name of row 0 is '7': expected a string"),
    "no rows": ("metadata.csv", b"file_name,text\n", "is empty: expected images"),
}


@pytest.mark.parametrize("case", METADATA)
def test_odd_metadata_are_one_line(case, tmp_path):
    file, content, message = METADATA[case]
    root = tree(tmp_path / "photos", "0.png")
    (root / file).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BadInput, match=message) as error: load_images(folder_config(root, caption_column="text"))
    assert one_line(error)


def test_metadata_of_several_folders_hold_the_same_columns(tmp_path):
    root = tree(tmp_path / "photos", "a/0.png", "b/1.png")
    notes(root / "a", [{"file_name": "0.png", "text": "x"}]), notes(root / "b",
                                                                    [{"file_name": "1.png", "text": "y", "label": 0}])
    with pytest.raises(BadInput,
                       match="b/metadata.csv and .*a/metadata.csv hold different columns: expected the same in each"):
        load_images(folder_config(root, caption_column="text"))
    data = load_images(folder_config(root, caption_column="text", conditional=False))
    assert [data.captions(i) for i in range(2)] == ["x", "y"]
    (root / "b" / "metadata.csv").rename(root / "b" / "metadata.jsonl")
    with pytest.raises(BadInput, match="expected metadata of one kind"):
        load_images(folder_config(root, caption_column="text"))


# --- caches of splits

def test_a_cache_knows_the_split_that_it_was_made_of(models, tmp_path):  # noqa: F811
    root = tree(tmp_path / "photos", "train/0.png", "train/1.png", "test/2.png")
    plain = tree(tmp_path / "plain", "0.png", "1.png")
    assert cached(plain, models, tmp_path / "plain-latents").facts["source"] == {}   # as before
    cached(root, models, tmp_path / "latents", split="test")
    cache = LatentCache(tmp_path / "latents")
    assert len(cache) == 1 and cache.facts["source"] == {"split": "test"}
    assert data_images(DataConfig(name=str(tmp_path / "latents"))).num_images == 1
    assert len(load_data(DataConfig(name=str(tmp_path / "latents"), split="eval"))) == 1
    for use in (load_data, data_images):
        with pytest.raises(BadInput, match="latents: unknown data.split 'validation': known: test"):
            use(DataConfig(name=str(tmp_path / "latents"), split="validation"))
        with pytest.raises(BadInput, match="latents: unknown data.split 'test': known: train"):
            use(DataConfig(name=str(tmp_path / "plain-latents"), split="test"))


def test_a_home_folder_is_found(tmp_path, monkeypatch, models):  # noqa: F811
    monkeypatch.setenv("HOME", str(tmp_path))
    tree(tmp_path / "photos", "0.png", "1.png")
    assert (len(load_data(DataConfig(name="~/photos", size=8))) == 2
            and len(image_folder(folder_config("~/photos"))) == 2)
    cached("~/photos", models, "~/latents", vae=str(models / "vae"))
    assert len(load_data("~/latents")) == 2 and (tmp_path / "latents").is_dir() and not Path("~").exists()
    assert data_images(DataConfig(name="~/latents")).num_images == 2
