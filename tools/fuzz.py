"""Feed broken files and words to everything that reads what
somebody else wrote, and count what is not answered in one line.

`python tools/fuzz.py [--inputs 20000] [--kinds patch,npz] [--seed 0]`.
An input is right if it is accepted, or refused by a `BadInput` of one
printable line; anything else (another exception, a line break or control
character in the message, more than 20 seconds) is a finding, and
its input is kept in `--findings`. `tests/test_fuzz.py` runs the same
kinds with a small budget, and the corpus of what was found before.
"""
import argparse
import contextlib
import copy
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import diffusers
import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save

import dmp_wb as wb
from dmp_wb.store.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from dmp_wb.store.run import load_model
from dmp_wb.look.tables import differences_table, evaluations, glance_table, metrics_table, open_compared
from dmp_wb.config import load_experiment, to_yaml
from dmp_wb.core.errors import BadInput
from dmp_wb.core.paths import named_files
from dmp_wb.data.cache import LatentCache
from dmp_wb.data.images import read_image
from dmp_wb.store.listing import list_runs, runs_table
from dmp_wb.evaluation.evaluate import evaluate
from dmp_wb.evaluation.extractors import load_extractor
from dmp_wb.evaluation.images import open_samples
from dmp_wb.evaluation.sample_files import sample_run
from dmp_wb.batch.plan import plan, read_sweep

PATIENCE = 20   # seconds that an answer may take

# Values that programs and people write by mistake, and attackers on purpose.
ODD = [None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e400, -1e400, math.nan, 10**7, 10**12, 10**30, -(10**30), 1e-320, "",
       " ", "null", "nan", "yes", "0012",
       "1e3", "\x00", "a\nb", "\x1b[2J", "‮", "🙂", "../..", "/etc/passwd", "~", "x" * 5000, "${name}", "${oc.env:HOME}",
       "${a:b", "{{7*7}}",
       "<script>", "2026-02-30", "12:30", [], [[]], {}, [None], [0, "a"], {"a": {}}, {"": 0}, {"format": 99}, [1e999],
       list(range(300))]


def deep(levels: int):
    "A list in a list in a list …"
    tree: list = []
    for _ in range(levels): tree = [tree]
    return tree


def mutated_tree(tree, draw: random.Random):
    """A copy of a tree of dicts and lists in which one to three
    places hold something else, are gone, or are there twice."""
    tree = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        holders = [tree]
        for node in holders:
            children = node.values() if isinstance(node, dict) else node
            holders += [c for c in children if isinstance(c, (dict, list)) and c]
        node = draw.choice(holders)
        if not node: continue
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        act = draw.random()
        if act < 0.65: node[key] = copy.deepcopy(draw.choice(ODD))
        elif act < 0.8: del node[key]
        elif act < 0.9 and isinstance(node, dict):
            node[draw.choice(["", "name", "_target_", "format", "\x00", "a.b", "1"])] = node[key]
        elif act < 0.93: node[key] = deep(draw.choice((3, 60)))
        else: node[key] = [node[key]] * 3
    return tree


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    "A copy of some bytes that is cut off, has others in a place, or has a stretch twice."
    act, at = draw.random(), draw.randrange(len(data) + 1)
    if act < 0.25: return data[:at]
    if act < 0.6:
        out = bytearray(data)
        for _ in range(draw.choice((1, 1, 4, 30))):
            if out: out[draw.randrange(len(out))] = draw.randrange(256)
        return bytes(out)
    if act < 0.75: return data[:at] + bytes(draw.randrange(256) for _ in range(draw.choice((1, 8, 200)))) + data[at:]
    if act < 0.85: return data[:at] + data[at // 2:]
    return draw.choice([b"", b"\xff\xfe", b"\x00" * 100, b"[" * 50_000, b"{" * 50_000, b'{"a":' * 20_000,
                        b"- " * 20_000, b"\x80\x04K\x01.",
                        b"&a [*a, *a]", b"a: &a [x]\n" + b"".join(b"a%d: &a%d [%s]\n" % (
                            i, i, b",".join([b"*a%d" % (i - 1) if i else b"*a"] * 9)) for i in range(9)),
                        b"!!python/object/apply:os.system ['true']", b"9" * 6000, b"\xef\xbb\xbf" + data])


def mutated_text(tree, dump: Callable, draw: random.Random) -> bytes:
    "A file of a tree, wrong in its values or in its bytes."
    if draw.random() < 0.75:
        with contextlib.suppress(ValueError, OverflowError, yaml.YAMLError, UnicodeEncodeError):
            return dump(mutated_tree(tree, draw)).encode("utf-8", "surrogatepass")
    return mutated_bytes(dump(tree).encode(), draw)


as_json = lambda tree: json.dumps(tree, ensure_ascii=False)
as_yaml = lambda tree: yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


class Fuzzer:
    "Valid files of every kind in a folder, and for each kind: how to break them, and what reads them."
    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        torch.manual_seed(0)
        self.model = wb.DiT(sample_size=8, patch_size=2, in_channels=1, hidden_size=16, num_layers=2,
                            num_attention_heads=2, num_classes=10).eval()
        self.experiment = yaml.safe_load(to_yaml(load_experiment("digits-dmp")))
        self.kinds: dict[str, tuple[Callable, Callable]] = {
            name.removeprefix("break_"): (getattr(self, name), getattr(self, name.replace("break_", "read_")))
            for name in dir(self) if name.startswith("break_")}
        self._make_valid()

    def _make_valid(self):
        f = self.folder
        wb.patch(self.model, wb.DMPConfig(init="random"))
        wb.save_patch(self.model, f / "patch")
        wb.unpatch(self.model)
        self.model.save_pretrained(f / "model")
        run = f / "run"
        run.mkdir()
        (run / "config.yaml").write_text(to_yaml(wb.Experiment(name="run", model=wb.ModelConfig("DiT-S/2"))))
        shutil.copytree(f / "model", run / "model")
        rows = [{"step": s, "loss": 1 / s, "mse": 1 / s, "mse/t000-499": 0.1, "images_per_second": 9.0}
                for s in range(1, 6)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        row = {"fid": 1.0, "precision": 0.5, "num_images": 10, "guidance_scale": 1.5, "reference": "digits",
               "extractor": "digits", "intervals": {"fid": [0.5, 1.5]}}
        (run / "summary.json").write_text(
            as_json({"status": "finished", "steps": 5, "loss": 0.2, "evaluations": [row], "versions": {}}))
        (run / "run.json").write_text(as_json({"status": "finished", "notebook": "pretrain.ipynb",
                                               "parameters": {"seed": 0}, "started": 1.0, "ended": 2.0, "attempts": 1}))
        save_checkpoint(f / "trained", 3, {"model": {"a": torch.ones(3)},
                                           "optimizer": {"state": {"0": {"step": 3}}, "groups": [{"lr": 0.1}]}})
        self.checkpoint = newest_checkpoint(f / "trained")
        self._make_cache(f / "cache")
        np.savez(f / "images.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
        np.savez_compressed(f / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
        buffer = io.BytesIO()
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, "PNG")
        self.png = buffer.getvalue()
        buffer = io.BytesIO()
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, "TIFF")
        self.tiff = buffer.getvalue()
        self.digits = load_extractor("digits")

    def _make_cache(self, folder: Path):
        from diffusers import AutoencoderKL
        torch.manual_seed(0)
        vae = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=1,
                            latent_channels=2, sample_size=8)
        vae.save_pretrained(self.folder / "vae")
        from dmp_wb.core.settings import DataConfig
        from dmp_wb.data.cache import write_cache
        images = self.folder / "photos"
        for label in ("a", "b"):
            (images / label).mkdir(parents=True)
            for i in range(3): Image.new("L", (8, 8), 40 * i).save(images / label / f"{i}.png")
        with contextlib.redirect_stderr(io.StringIO()):
            write_cache(DataConfig(name=str(images), size=8, channels=1, vae=str(self.folder / "vae"), num_workers=0),
                        folder, images_per_shard=4, say=lambda line: None)

    # --- experiments and words
    def break_experiment(self, draw):
        file = draw.choice(list(named_files("experiments").values()))
        return mutated_text(yaml.safe_load(file.read_text()) if draw.random() < 0.5 else self.experiment, as_yaml, draw)

    def read_experiment(self, data: bytes, folder: Path):
        (folder / "x.yaml").write_bytes(data)
        load_experiment(folder / "x.yaml")

    def break_override(self, draw):
        leaves: list[str] = []
        def walk(tree, prefix=""):
            for k, v in tree.items():
                leaves.append(prefix + k)
                if isinstance(v, dict): walk(v, f"{prefix}{k}.")
        walk(self.experiment)
        value = draw.choice(ODD)
        text = draw.choice([str, json.dumps, repr])(value)
        word = draw.choice([f"{draw.choice(leaves)}={text}", f"{draw.choice(leaves)}", f"={text}",
                            f"{draw.choice(leaves)}.{draw.choice(leaves)}={text}",
                            f"{draw.choice(leaves)}[0]={text}", f"{draw.choice(leaves)}={{a: {text}}}",
                            f"{text}={draw.choice(leaves)}"])
        return word.encode("utf-8", "surrogatepass")

    def read_override(self, data: bytes, folder: Path):
        load_experiment("digits-dmp", [data.decode("utf-8", "surrogateescape")])

    def break_sweep(self, draw):
        tree = {"name": "s", "notebook": "pretrain", "parameters": {"train.steps": 3, "num_samples": 4},
                "grid": {"optim.lr": [1e-3, 2e-3], "seed": [0, 1]},
                "runs": [{"name": "a", "parameters": {"train.batch_size": 4}}]}
        return mutated_text(tree, as_yaml, draw)

    def read_sweep(self, data: bytes, folder: Path):
        (folder / "s.yaml").write_bytes(data)
        given = read_sweep(folder / "s.yaml")
        plan(given.get("notebook"), given.get("parameters"), given.get("grid"), given.get("runs"))

    # --- what a run leaves
    def break_run(self, draw):
        name = draw.choice(["config.yaml", "summary.json", "run.json", "metrics.jsonl"])
        file = self.folder / "run" / name
        if name == "metrics.jsonl":
            lines = file.read_text().splitlines()
            lines[draw.randrange(len(lines))] = mutated_text(json.loads(lines[-1]), as_json, draw).decode("utf-8",
                                                                                                          "replace")
            data = "\n".join(lines).encode("utf-8", "replace")
        else: data = mutated_text(yaml.safe_load(file.read_text()), as_yaml if name == "config.yaml" else as_json, draw)
        return name.encode() + b"\0" + data

    def read_run(self, data: bytes, folder: Path):
        "The listing and the comparison must stand, whatever is in one of two runs; they may leave it out, by name."
        name, _, data = data.partition(b"\0")
        for run in ("good", "bad"): shutil.copytree(self.folder / "run", folder / run)
        (folder / "bad" / name.decode()).write_bytes(data)
        runs, left_out = list_runs(folder)
        if "good" not in {r.name for r in runs}: raise AssertionError("a broken run took a good one from the list")
        if "bad" not in {*(r.name for r in runs), *left_out}:
            raise AssertionError("a broken run is neither listed nor said to be left out")
        check_line(runs_table(runs, []).replace("\n", " "))
        for why in left_out.values(): check_line(why)
        json.dumps([r.plain() for r in runs], default=str)
        compared = open_compared([str(folder / "good"), str(folder / "bad")])
        glance_table(compared)
        differences_table(compared)
        for rows in evaluations(compared, 1).values(): metrics_table(rows, list(compared.runs))

    def break_checkpoint(self, draw):
        file = draw.choice(sorted(p for p in self.checkpoint.iterdir() if p.is_file()))
        data = (mutated_text(json.loads(file.read_text()), as_json, draw) if file.suffix == ".json"
                else mutated_bytes(file.read_bytes(), draw))
        return file.name.encode() + b"\0" + data

    def read_checkpoint(self, data: bytes, folder: Path):
        name, _, data = data.partition(b"\0")
        shutil.copytree(self.folder / "trained", folder / "t")
        (folder / "t" / self.checkpoint.relative_to(self.folder / "trained") / name.decode()).write_bytes(data)
        if found := newest_checkpoint(folder / "t"): load_checkpoint(found)

    # --- patches, models, caches
    def _break_folder(self, name, draw):
        file = draw.choice(
            sorted(p for p in (self.folder / name).rglob("*") if p.is_file() and p.suffix in (".json", ".safetensors")))
        if file.suffix == ".json": data = mutated_text(json.loads(file.read_text()), as_json, draw)
        elif draw.random() < 0.5: data = mutated_bytes(file.read_bytes(), draw)
        else:
            data = save({draw.choice(["prompts", "gate.weight", "x" * 300, "moments", "class_labels", ""]): draw.choice(
                [torch.full((2, 3), math.nan), torch.zeros(0), torch.zeros(1, dtype=torch.bool),
                 torch.ones(6, dtype=torch.int64) * 99, torch.zeros(2, 16, 16), torch.zeros((), dtype=torch.float16)])})
        return str(file.relative_to(self.folder / name)).encode() + b"\0" + data

    def _broken(self, name, data, folder):
        file, _, data = data.partition(b"\0")
        shutil.copytree(self.folder / name, folder / name)
        (folder / name / file.decode()).write_bytes(data)
        return folder / name

    def break_patch(self, draw): return self._break_folder("patch", draw)

    def read_patch(self, data: bytes, folder: Path):
        try: wb.load_patch(self.model, self._broken("patch", data, folder))
        finally:
            for name in list(wb.patches_of(self.model)) if hasattr(wb, "patches_of") else []:
                wb.unpatch(self.model, name)
            if getattr(self.model, "dmp", None) is not None: wb.unpatch(self.model)

    def break_model(self, draw): return self._break_folder("model", draw)
    def read_model(self, data: bytes, folder: Path): load_model(self._broken("model", data, folder))

    def break_cache(self, draw): return self._break_folder("cache", draw)

    def read_cache(self, data: bytes, folder: Path):
        cache = LatentCache(self._broken("cache", data, folder))
        batch = cache.batch(torch.tensor([0, len(cache) - 1]))
        if not all(v.float().isfinite().all() for v in batch.values()):
            raise AssertionError("a cache gives what is not finite")

    # --- images and arrays
    def break_image(self, draw): return mutated_bytes(draw.choice((self.png, self.tiff)), draw)

    def read_image(self, data: bytes, folder: Path):
        (folder / "a.png").write_bytes(data)
        read_image(folder / "a.png", 3)

    def break_npz(self, draw):
        name = draw.choice(("images", "statistics"))
        if draw.random() < 0.5:
            return name.encode() + b"\0" + mutated_bytes((self.folder / f"{name}.npz").read_bytes(), draw)
        shape = draw.choice([(0,), (), (10**12, 8, 8, 3), (4, 8, 8, 3), (4, 8, 8, 2), (4, 3, 8, 8), (64,), (64, 64),
                             (-1, 8)])
        head = {"descr": draw.choice(["|u1", "<f4", "<f8", "<c16", "|O", "<U9", "<i8", "|b1", "<M8[s]"]),
                "fortran_order": draw.choice([True, False]), "shape": shape}
        text = str(head) if draw.random() < 0.8 else draw.choice(
            ["(" * 2000, "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': ()}", "__import__('os')"])
        header = text.encode() + b"\n"
        array = b"\x93NUMPY\x01\x00" + min(len(header), 65535).to_bytes(2, "little") + header + bytes(
            draw.choice((0, 100, 4 * 8 * 8 * 3)))
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as z:
            for entry in draw.choice((["arr_0.npy"], ["mu.npy", "sigma.npy"], ["arr_0"], ["../arr_0.npy"], [])):
                z.writestr(entry, array)
        data = bytearray(buffer.getvalue())
        # says that it is encrypted
        if draw.random() < 0.1 and (at := data.find(b"PK\x01\x02")) >= 0: data[at + 8] |= 1
        return name.encode() + b"\0" + bytes(data)

    def read_npz(self, data: bytes, folder: Path):
        name, _, data = data.partition(b"\0")
        (folder / "x.npz").write_bytes(data)
        if name == b"images": next(iter(open_samples(folder / "x.npz").batches(2)), None)
        else: evaluate(torch.zeros(3, 1, 8, 8), folder / "x.npz", self.digits, "fid", cache=False, quiet=True)

    def break_words(self, draw):
        kind, good = draw.choice((("labels", b"1 2 3\n4\n"), ("captions", b"a cat\na dog\n")))
        odd = [b"9" * 6000, b"-1", b"1.5", b"\xff\xfe\x00", b"10", b"99999999999999999999", b"\x00", "٣".encode(),
               "²".encode(), b"0x1", b"1_0"]
        return kind.encode() + b"\0" + draw.choice([mutated_bytes(good, draw), draw.choice(odd),
                                                    good + draw.choice(odd)])

    def read_words(self, data: bytes, folder: Path):
        kind, _, data = data.partition(b"\0")
        (folder / "w.txt").write_bytes(data)
        given = {"class_labels" if kind == b"labels" else "captions": folder / "w.txt"}
        sample_run(self.folder / "run", 3, folder / "out", num_inference_steps=1, device="cpu", quiet=True, npz=False,
                   sampler="ddim", **given)

    def break_samples(self, draw):
        tree = {"format": 1, "run": "run", "num_images": 2, "seed": 0, "sampler": "ddim", "class_labels": "balanced"}
        return mutated_text(tree, as_json, draw)

    def read_samples(self, data: bytes, folder: Path):
        from dmp_wb.evaluation.sample_files import SAMPLES_PLAN
        (folder / "out").mkdir()
        (folder / "out" / SAMPLES_PLAN).write_bytes(data)
        sample_run(self.folder / "run", 2, folder / "out", num_inference_steps=1, device="cpu", quiet=True, npz=False,
                   sampler="ddim")

    # --- one input
    def make(self, kind: str, number: int, seed: int = 0) -> bytes:
        "The input of this number, the same each time."
        return self.kinds[kind][0](random.Random(f"{seed} {kind} {number}"))

    def answer(self, kind: str, data: bytes) -> str | None: # what is wrong; None if nothing is
        with (tempfile.TemporaryDirectory(dir=self.folder.parent) as d, warnings.catch_warnings(),
              contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())):
            warnings.simplefilter("ignore")
            try:
                with patience(PATIENCE): self.kinds[kind][1](data, Path(d))
            except BadInput as e:
                try: check_line(str(e))
                except AssertionError as wrong: return str(wrong)
            except Exception as e:
                frame = traceback.extract_tb(e.__traceback__)[-1]
                return (f"{type(e).__name__} at {Path(frame.filename).name}:{frame.lineno}: "
                        f"{str(e).splitlines()[0][:150] if str(e) else ''}")
        return None


def check_line(text: str):
    "An error is one printable line of a length that a person reads."
    bad = sorted({c for c in text if not c.isprintable()})
    if bad: raise AssertionError(f"a message holds {bad[0]!r}: {text[:80]!r}")
    if len(text) > 4000: raise AssertionError(f"a message of {len(text)} characters: {text[:80]!r}")


@contextlib.contextmanager
def patience(seconds: int):
    "Raise `TimeoutError` in the main thread after so many seconds."
    def late(*_): raise TimeoutError(f"no answer within {seconds} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_kind(
    fuzzer: Fuzzer,
    kind: str,
    count: int,                         # inputs
    seed: int = 0,
    inputs: list[bytes] | None = None,  # in place of new ones
) -> list[tuple[int, str]]: # number of the input, what is wrong with its answer
    """Answer so many inputs in a forked process;
    one that dies (a segmentation fault, out of memory) is a finding, and the next goes on after it."""
    wrong, begin = [], 0
    while begin < count:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            diffusers.utils.logging.set_verbosity(100)   # what it warns of is no answer of ours
            with os.fdopen(writer, "w") as out:
                for i in range(begin, count):
                    print(f"{i}", file=out, flush=True)
                    if fault := fuzzer.answer(kind, inputs[i] if inputs else fuzzer.make(kind, i, seed)):
                        print(f"{i} {fault!r}", file=out, flush=True)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as lines:
            for line in lines:
                number, _, fault = line.rstrip("\n").partition(" ")
                begin = int(number) + 1
                if fault: wrong.append((int(number), fault.strip("'\"")))
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            wrong.append((begin - 1, f"the process died of {signal.Signals(os.WTERMSIG(status)).name}"))
        elif status: wrong.append((begin - 1, f"the process ended with status {os.waitstatus_to_exitcode(status)}"))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="of all kinds together")
    parser.add_argument("--kinds", default="", help="only these, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, help="a folder for inputs that were answered wrongly")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as d:
        os.environ["DMP_WB_RUNS"] = f"{d}/runs"
        (valid := Path(d) / "valid").mkdir()
        fuzzer = Fuzzer(valid)
        kinds = [k for k in a.kinds.split(",") if k] or list(fuzzer.kinds)
        wrong: Counter = Counter()
        examples: dict[tuple[str, str], bytes] = {}
        for kind in kinds:
            begun, n = time.monotonic(), max(1, a.inputs // len(kinds))
            found = run_kind(fuzzer, kind, n, a.seed)
            for number, fault in found:
                wrong[kind, fault] += 1
                examples.setdefault((kind, fault), fuzzer.make(kind, number, a.seed))
            print(f"{kind:11} {n:6} inputs, {len(found)} answered wrongly ({time.monotonic() - begun:.0f} s)",
                  flush=True)
    for i, ((kind, fault), count) in enumerate(wrong.most_common()):
        print(f"{count:6} × {kind}: {fault}")
        if a.findings:
            (a.findings / kind).mkdir(parents=True, exist_ok=True)
            (a.findings / kind / f"{i:03d}.bin").write_bytes(examples[kind, fault])
    return min(wrong.total(), 1)


if __name__ == "__main__": sys.exit(main())
