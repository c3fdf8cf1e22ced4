"Latent caches whose checksums are right and whose content is not, killed writers, and disks that are full."
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from test_data import cached, captioned, content, models, no_hub, one_line, photos, quiet  # noqa: F401

from dmp_wb.core import errors
from dmp_wb.data import cache as data_cache, cache_facts
from dmp_wb.data import encoders
from dmp_wb.core.errors import BadInput
from dmp_wb.core.settings import DataConfig
from dmp_wb.data.cache import LatentCache, write_cache
from dmp_wb.data.load import load_data
from dmp_wb.data.sources import readers
from dmp_wb.evaluation.images import data_images
from dmp_wb.evaluation.sample_files import _read_captions, _read_labels


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):  # noqa: F811
    "A cache of seven images of two classes in three shards, and one of captions."
    root = tmp_path_factory.mktemp("made")
    cached(photos(root / "photos", 7), models, root / "latents")
    cached(captioned(root), models, root / "text", caption_column="text", text_encoder=str(models / "clip"))
    return root


@pytest.fixture
def folder(made, tmp_path): return Path(shutil.copytree(made / "latents", tmp_path / "latents"))


def rewrite(folder, number, change, metadata=None, name=None):
    "Change a shard's tensors, and note the right checksum everywhere."
    file = folder / (name or f"shard-{number:05d}.safetensors")
    tensors = load_file(file)
    tensors = change(tensors) or tensors
    written = save({k: v.contiguous() for k, v in tensors.items()}, metadata)
    file.write_bytes(written)
    note(folder, number, bytes=len(written), sha256=hashlib.sha256(written).hexdigest())


def note(folder, number, **changes):
    facts = json.loads((folder / "latents.json").read_text())
    facts["shards"][number] |= changes
    (folder / "latents.json").write_text(json.dumps(facts))


def put(key, value, row=0):
    def change(t): t[key][row] = value
    return change


CONTENT = {   # what becomes of a shard's tensors; the message
    "NaN": (put("moments", float("nan"), 2), "holds NaN or infinite numbers in moments, rows 0 to 2"),
    "infinite": (put("moments", float("-inf")), "holds NaN or infinite numbers in moments"),
    "a label of no class": (put("class_labels", 99), r"holds class label 99: expected 0 to 1"),
    "a label below": (put("class_labels", -1), r"holds class label -1: expected 0 to 1"),
    "huge variances": (lambda t: {**t, "moments": t["moments"] + 100},
                       "holds log variances up to 1.*: expected at most 40"),
    "fewer rows": (lambda t: {k: v[:2] for k, v in t.items()}, r"holds I64 \[2\] as class_labels: expected I64 \[3\]"),
    "other latents": (lambda t: {**t, "moments": t["moments"][..., :2]},
                      r"holds F32 \[3, 2, 8, 4, 2\] as moments: expected F32 \[3, 2, 8, 4, 4\]"),
    "no mirror images": (lambda t: {**t, "moments": t["moments"][:, 0]}, r"as moments: expected F32 \[3, 2, 8, 4, 4\]"),
    "half precision": (lambda t: {**t, "moments": t["moments"].half()}, "holds F16 .* as moments: expected F32"),
    "labels as floats": (lambda t: {**t, "class_labels": t["class_labels"].float()},
                         r"holds F32 \[3\] as class_labels: expected I64"),
    "no labels": (lambda t: {"moments": t["moments"]}, "holds nothing as class_labels"),
    "no moments": (lambda t: {"class_labels": t["class_labels"]}, "holds nothing as moments"),
    "something more": (lambda t: {**t, "more": torch.zeros(3)}, r"holds F32 \[3\] as more: expected nothing"),
    "nothing": (lambda t: {"x": torch.zeros(1)}, "holds nothing as class_labels"),
}


@pytest.mark.parametrize("case", CONTENT)
def test_a_shard_of_right_checksum_and_wrong_content_is_refused(case, folder):
    change, message = CONTENT[case]
    rewrite(folder, 1, change)
    for _ in range(2):
        with pytest.raises(BadInput, match=message) as error: load_data(str(folder))
        assert ("shard-00001.safetensors" in str(error.value) and "run dmp-wb latents again" in str(error.value)
                and one_line(error))


def test_a_cache_that_an_older_version_verified_is_verified_again(folder):
    rewrite(folder, 1, put("moments", float("nan")))
    facts = json.loads((folder / "latents.json").read_text())
    stat = lambda e: (folder / e["file"]).stat()
    (folder / ".verified.json").write_text(
        json.dumps({e["file"]: [e["sha256"], stat(e).st_size, stat(e).st_mtime_ns] for e in facts["shards"]}))
    with pytest.raises(BadInput, match="holds NaN"): load_data(str(folder))


def test_fewer_classes_than_a_verified_cache_had_are_noticed(folder):
    assert len(load_data(str(folder))) == 7
    facts = json.loads((folder / "latents.json").read_text())
    (folder / "latents.json").write_text(json.dumps(facts | {"class_names": ["cat"]}))
    with pytest.raises(BadInput, match="holds class label 1: expected 0 to 0"): load_data(str(folder))


@pytest.mark.parametrize("aware", [True, False])
def test_a_shard_under_anothers_name_is_refused(aware, folder):
    "`aware`: written by this version, whose shards say their number."
    if not aware:
        for n in range(3): rewrite(folder, n, lambda t: t, {})
        assert len(load_data(str(folder))) == 7   # as older ones wrote it
    shutil.copy(folder / "shard-00000.safetensors", folder / "shard-00001.safetensors")
    entry = json.loads((folder / "latents.json").read_text())["shards"][0]
    note(folder, 1, bytes=entry["bytes"], sha256=entry["sha256"])
    with pytest.raises(BadInput, match="two shards have the checksum .*: expected each image once"):
        load_data(str(folder))
    shutil.copytree(folder, folder.parent / "moved")
    if not aware: return
    shards = json.loads((folder / "latents.json").read_text())["shards"]
    (folder / "shard-00000.safetensors").unlink()
    rewrite(folder, 0, lambda t: {k: v + 0 for k, v in t.items()}, {"shard": "1"}, "shard-00001.safetensors")
    os.replace(folder / "shard-00001.safetensors", folder / "shard-00000.safetensors")
    shutil.copy(folder.parent / "moved" / "shard-00001.safetensors", folder / "shard-00001.safetensors")
    note(folder, 1, **{k: shards[1][k] for k in ("bytes", "sha256")})
    with pytest.raises(BadInput, match="shard-00000.safetensors is shard '1' under another name"):
        load_data(str(folder))


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "../shard-00001.safetensors", "/etc/hostname",
                                  "shard-1.safetensors", 7, None])
def test_a_shards_name_is_its_place(name, folder):
    note(folder, 1, file=name)
    with pytest.raises(BadInput, match="latents.json: (shard 1 is|file is)") as error: load_data(str(folder))
    assert one_line(error)


FACTS = {"images": [0, -1, 8, 1.5, True, "7", None, 10**400],
         "latent_shape": [[4, 4], [4, 4, 0], "444", None, [1e9, 1, 1]], "class_names": [None, "ab", [1, 2], ["a", "a"]],
         "scale": ["1", None, 0, float("nan"), float("inf"), []],
         "shift": ["0", None, float("inf")], "dtype": ["float64", None, 3, []], "images_per_shard": [0, 2, "3", None],
         "shards": [[], None, {}, [7], [None], [{}]], "size": [0, None, "8"], "channels": [2, None, True and "3"],
         "source": [[], "x", {"name": "x"}, {"split": 3}], "format": [None, 2, [], "1"], "vae": [None, 3],
         "data": [None, 3, []], "text_encoder": [3, []], "text_length": [0, "9"]}


@pytest.mark.parametrize("key", FACTS)
def test_what_a_cache_says_of_itself_is_checked(key, folder):
    facts = json.loads((folder / "latents.json").read_text())
    for value in FACTS[key]:
        (folder / "latents.json").write_text(json.dumps(facts | {key: value}))
        for use in (lambda: load_data(str(folder)), lambda: data_images(DataConfig(name=str(folder)))):
            with pytest.raises(BadInput) as error: use()
            assert one_line(error) and len(str(error.value)) < 500, value
    (folder / "latents.json").write_text(json.dumps({k: v for k, v in facts.items() if k != key}))
    if key == "source": assert len(load_data(str(folder))) == 7   # older ones lack it
    else:
        with pytest.raises(BadInput): load_data(str(folder))


BROKEN = [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100000, b'{"a": ' * 50000, b'{"format": 1}', b"9" * 6000,
          b'{"format": 1, "shards": [[]]}']


@pytest.mark.parametrize("name", ["latents.json", "plan.json", "shard-00001.json", ".verified.json"])
def test_broken_json_of_a_cache_is_one_line(name, folder, made, models):  # noqa: F811
    for text in BROKEN:
        (folder / name).write_bytes(text)
        if name == "latents.json":
            with pytest.raises(BadInput) as error: load_data(str(folder))
        elif name == ".verified.json": assert len(load_data(str(folder))) == 7; continue   # a note that may be lost
        else:
            (folder / "latents.json").unlink(missing_ok=True)
            with pytest.raises(BadInput) as error: cached(made / "photos", models, folder)
        assert one_line(error) and name in str(error.value) or "format" in str(error.value)
        if name != "plan.json": continue
        with pytest.raises(BadInput) as error: load_data(str(folder))
        assert one_line(error)


@pytest.mark.parametrize("text", [b"", b"no tensors", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0" + b"[" * 16,
                                  (10**6).to_bytes(8, "little") + b"[" * 10**6])
def test_a_shard_that_is_no_file_of_tensors_is_refused(text, folder):
    (folder / "shard-00001.safetensors").write_bytes(text)
    note(folder, 1, bytes=max(1, len(text)), sha256=hashlib.sha256(text).hexdigest())
    with pytest.raises(BadInput, match="shard-00001.safetensors (is no file of tensors|does not match)") as error:
        load_data(str(folder))
    assert one_line(error)


@pytest.mark.parametrize("name", ["latents.json", "plan.json", "shard-00001.safetensors", "shard-00001.json",
                                  "null.safetensors"])
def test_a_pipe_in_a_cache_is_never_opened(name, made, tmp_path, models):  # noqa: F811
    folder = Path(shutil.copytree(made / ("text" if name.startswith("null") else "latents"), tmp_path / "latents"))
    if name in ("plan.json", "shard-00001.json"): (folder / "latents.json").unlink()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(BadInput):
        LatentCache(folder) if name in ("latents.json", "shard-00001.safetensors",
                                        "null.safetensors") else cached(made / "photos", models, folder)


@pytest.mark.parametrize("change,message",
                         [(lambda t: {"other": next(iter(t.values()))}, "holds other: expected some of"),
                          (lambda t: {k: v * float("nan") for k, v in t.items()}, "holds NaN or infinite numbers"),
                          (lambda t: {k: v[..., :3] for k, v in t.items()}, "shard-00000.safetensors holds")])
def test_an_empty_caption_of_right_checksum_and_wrong_content_is_refused(change, message, made, tmp_path):
    folder = Path(shutil.copytree(made / "text", tmp_path / "latents"))
    file = folder / "null.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)
    facts = json.loads((folder / "latents.json").read_text())
    (folder / "latents.json").write_text(
        json.dumps(facts | {"null_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}))
    with pytest.raises(BadInput, match=message): LatentCache(folder)


def test_latents_that_are_not_finite_are_not_written(models, tmp_path, monkeypatch):  # noqa: F811
    original = encoders.LatentCoder.moments
    monkeypatch.setattr(encoders.LatentCoder, "moments", lambda coder, images: original(coder, images) * 1e6)
    with pytest.raises(BadInput, match="moments of images near cat/00.png are not finite in float16"):
        cached(photos(tmp_path / "photos", 7), models, tmp_path / "latents", dtype="float16")


# --- killed, and full

def leftovers(folder): return sorted(p.name for p in folder.iterdir() if p.name.endswith(".tmp"))


def test_what_a_killed_process_left_is_removed_by_the_next_and_nothing_else(made, tmp_path, models):  # noqa: F811
    folder = Path(shutil.copytree(made / "latents", tmp_path / "latents"))
    for name in ("latents.json", "shard-00002.json"): (folder / name).unlink()
    ours = [".shard-00002.safetensors.ab12.tmp", ".shard-00002.json.x_y.tmp", ".plan.json.0.tmp", ".latents.json.0.tmp",
            ".null.safetensors.0.tmp", "..verified.json.0.tmp"]
    theirs = [".other.tmp", "notes.tmp", ".shard-x.safetensors.0.tmp"]
    for name in ours + theirs: (folder / name).write_bytes(b"half")
    script = "import sys, dmp_wb.data as D\nwith D._writing(D.Path(sys.argv[1])): print(flush=True), input()"
    other = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    assert leftovers(folder) == sorted(theirs)   # it was the first to come
    (folder / ours[0]).write_bytes(b"half")
    cached(made / "photos", models, folder)
    assert ours[0] in leftovers(folder)          # it may be the other's, who lives
    other.communicate(b"\n")
    cached(made / "photos", models, folder)
    assert leftovers(folder) == sorted(theirs) and content(folder).items() >= content(made / "latents").items()


@pytest.mark.parametrize("last", ["plan.json", "null.safetensors", "shard-00000.safetensors", "shard-00001.json",
                                  "latents.json"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_one_line_and_the_cache_goes_on_when_there_is_room(
        last, code, made, models, tmp_path, monkeypatch):   # noqa: F811
    with monkeypatch.context() as m:
        replace = os.replace
        def full(a, b):
            if Path(b).name == last: raise OSError(code, os.strerror(code))
            return replace(a, b)
        m.setattr(errors.os, "replace", full)
        with pytest.raises(BadInput, match=f"{last} cannot be written: {os.strerror(code)}; the shards that are done "
                           "stay, run dmp-wb latents again") as error:
            again(made, models, tmp_path)
        assert one_line(error) and leftovers(tmp_path / "latents") == []
    again(made, models, tmp_path)
    assert content(tmp_path / "latents") == content(made / "text")


def again(made, models, tmp_path):  # noqa: F811
    name = str(made / "captioned")
    return cached(name, models, tmp_path / "latents", caption_column="text", text_encoder=str(models / "clip"))


def test_a_cache_is_not_written_through_a_link_or_into_a_file(made, models, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="file cannot be written"): cached(made / "photos", models, tmp_path / "file")
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / ".lock").symlink_to(tmp_path / "file")
    with pytest.raises(BadInput, match="link"): cached(made / "photos", models, tmp_path / "latents")
    assert (tmp_path / "file").read_text() == "mine"


# --- label and caption files of `sample`

@pytest.mark.parametrize("text", ["9" * 6000, "1 2 x", "1.5", "٣", "1_000", "-", "0x1"])
def test_an_odd_label_file_is_one_line(text, tmp_path):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(BadInput,
                       match="class_labels file .* holds '.*': expected a class number for each image") as error:
        _read_labels(tmp_path / "labels.txt")
    assert one_line(error) and len(str(error.value)) < 400


def test_a_caption_file_that_is_not_utf8_is_one_line(tmp_path):
    (tmp_path / "captions.txt").write_bytes(b"a cat\ncaf\xe9\n")
    with pytest.raises(BadInput, match="captions.txt is no UTF-8, from byte 9") as error:
        _read_captions(tmp_path / "captions.txt")
    assert one_line(error)
    (tmp_path / "captions.txt").write_bytes("\ufeffa cat\ncafé\n".encode())
    assert _read_captions(tmp_path / "captions.txt") == ["a cat", "café"]


def test_a_cache_can_be_written_by_many_processes_that_share_a_lock(models, tmp_path):  # noqa: F811
    root = photos(tmp_path / "photos", 7)
    with cache_facts._writing(tmp_path / "latents"):
        assert write_cache(DataConfig(name=str(root), size=8, num_workers=0, vae=str(models / "vae")),
                           tmp_path / "latents", images_per_shard=3, part=(0, 2), say=quiet) is None


# --- read by several processes

def test_one_process_verifies_and_the_others_wait_for_its_word(folder, monkeypatch):
    (folder / ".verified.json").unlink()
    read, original = [], cache_facts.sha256_of

    def slow(file):
        read.append(Path(file).name)
        time.sleep(0.05)
        return original(file)
    monkeypatch.setattr(cache_facts, "sha256_of", slow)
    with ThreadPoolExecutor(4) as pool:   # a lock of its own for each opening, as processes have
        caches = list(pool.map(lambda _: LatentCache(folder), range(4)))
    assert sorted(read) == [f"shard-0000{n}.safetensors" for n in range(3)] and all(len(c) == 7 for c in caches)


def test_what_was_good_before_an_error_is_not_read_again(folder, monkeypatch):
    (folder / ".verified.json").unlink()
    rewrite(folder, 2, put("moments", float("nan")))
    read, original = [], cache_facts.sha256_of
    monkeypatch.setattr(cache_facts, "sha256_of", lambda file: read.append(Path(file).name[:11]) or original(file))
    for _ in range(2):
        with pytest.raises(BadInput, match="NaN"): LatentCache(folder)
    assert read == ["shard-00000", "shard-00001", "shard-00002", "shard-00002"]


def test_half_a_note_of_a_killed_process_is_removed_by_the_next_that_verifies(folder):
    (folder / ".verified.json").unlink()
    (folder / "..verified.json.2f6e6f1b.tmp").write_text("{")
    LatentCache(folder)
    assert (folder / ".verified.json").exists() and not leftovers(folder)


def test_a_cache_of_others_is_verified_once_too(folder, tmp_path, monkeypatch):
    (folder / ".verified.json").unlink()
    monkeypatch.setenv("DMP_WB_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(cache_facts.os, "access", lambda path, mode: False)
    before, read, original = sorted(folder.iterdir()), [], cache_facts.sha256_of
    monkeypatch.setattr(cache_facts, "sha256_of", lambda file: read.append(file) or original(file))
    for _ in range(2): LatentCache(folder)
    assert len(read) == 3 and sorted(folder.iterdir()) == before
    assert len(list((tmp_path / "runs" / ".verified").glob("*.json"))) == 1


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_batch_is_its_images_whatever_their_order(kind, made, monkeypatch):
    cache = LatentCache(made / kind)
    g = torch.Generator().manual_seed(0)
    indices = torch.randint(len(cache), (20,), generator=g)   # images may come twice, and shards in any order
    flip, drop = torch.rand(20, generator=g) < 0.5, torch.rand(20, generator=g) < 0.3
    noise = torch.randn(20, *cache.shape, generator=g)
    monkeypatch.setattr(data_cache, "AT_ONCE", 3 * noise[0].numel())
    batch = cache.batch(indices, flip, noise, drop)
    assert batch.keys() >= {"images", *cache.null}
    for i in range(20):
        one = cache.batch(*(v[i:i + 1] for v in (indices, flip, noise, drop)))
        assert all(torch.equal(one[k][0], batch[k][i]) for k in batch)
    shard = load_file(made / kind / "shard-00001.safetensors")
    moments = shard["moments"][1, 1].float()
    mine = cache.batch(torch.tensor([4]), torch.tensor([True]))["images"][0]   # three images a shard
    assert torch.equal(mine, cache.facts["scale"] * (moments[:len(moments) // 2] - cache.facts["shift"]))


def test_a_cache_is_read_by_as_many_processes_as_files_are(made):
    assert LatentCache(made / "latents").workers == readers()
