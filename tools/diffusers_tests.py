"""diffusers' own tests of its models, on models that are patched and routed.

`python tools/diffusers_tests.py --diffusers CLONE [--at v0.40.0] [--out tools/diffusers_tests.json] [CLASS …]`: CLONE
is a git clone of diffusers, a bare one too, since its wheels hold no tests; `--at` names a tag of about the version
that is installed. In the test classes of every supported class `model_class` is exchanged for one whose models come
with a patch of random numbers and with routing. What does not pass then is run on plain models; where the outcome is
another it is printed, and written with --out. Tests that ask for an accelerator only to save time run here too; those
of offloading and those that need the network do not. Graphs are compiled with --compiled alone, by the backend `eager`.
A class that diffusers has no test of gets one of the same parts, with the model that this package's tests have of it.
"""
import argparse
import contextlib
import gc
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = "slow or nightly or memory or quantization or single_file or context_parallel or tensor_parallel"
# outcomes that differ and are no fault, by the end of a test's name: why
ARTEFACTS = {
    "keep_in_fp32_modules(_as_str)?$": "a patch stays in float32, whatever its backbone is in",
    "test_sharded_checkpoints": "the size that the test has files split by counts the patch, which is not in them",
    "test_loading_motion_adapter$": "the test makes a model without a size, of which a patch has to be told one",
    "TestUNetMotionModelTraining::test_gradient_checkpointing_equivalence":
        "its middle block checkpoints more than a block, which is refused in one line",
    "Flux2TransformerKVCache::": "Flux 2 with the tokens of other images is refused, as the page of backbones says",
}

# packages that only their tests of published weights use, and that are imported by others
STAND_INS = {"parameterized": "class parameterized: expand = lambda *_, **__: lambda f: f\n", "requests_mock": ""}

OWN_TEST = '''
from ..testing_utils import (AttentionTesterMixin, BaseModelTesterConfig, LoraTesterMixin, MemoryTesterMixin,
                             ModelTesterMixin, TorchCompileTesterMixin, TrainingTesterMixin)
from diffusers_tests import own_model


class Config(BaseModelTesterConfig):
    model_class = own_model("{name}")[0]
    main_input_name = "hidden_states"
    output_shape = property(lambda self: tuple(own_model("{name}")[2][1:]))
    def get_init_dict(self): return dict(own_model("{name}")[1])
    def get_dummy_inputs(self): return own_model("{name}")[3]()


class TestModel(Config, ModelTesterMixin): pass
class TestTraining(Config, TrainingTesterMixin): pass
class TestAttention(Config, AttentionTesterMixin): pass
class TestMemory(Config, MemoryTesterMixin): pass
class TestLoRA(Config, LoraTesterMixin): pass
class TestCompile(Config, TorchCompileTesterMixin): pass
'''


def own_model(name: str) -> tuple:
    "Of a class that diffusers does not test: the class, its settings, the shape of its answer, and inputs."
    import diffusers
    from backbones import MODELS, inputs_for
    from more_backbones import CASES
    from dmp_wb.methods.check import output_of
    cls, settings = MODELS[name] if name in MODELS else (getattr(diffusers, name), CASES[name][0])
    inputs = (lambda: inputs_for(name)) if name in MODELS else CASES[name][1]
    with torch.no_grad(): shape = output_of(cls(**settings).eval(), inputs()).shape
    return cls, settings, shape, inputs


class Made:
    "In place of a class of diffusers: its models come with a patch, or with routing."
    def __init__(self, cls, put): self.__dict__.update(_cls=cls, _put=put, _before={}, __init__=cls.__init__)
    def __call__(self, *args, **kw): return self._put(self._cls(*args, **kw))
    def __getattr__(self, name): return getattr(self._cls, name)
    def __setattr__(self, name, value):
        self._before.setdefault(name, getattr(self._cls, name))
        setattr(self._cls, name, value)

    def __delattr__(self, name): setattr(self._cls, name, self._before[name])   # as `monkeypatch` takes things back
    def __instancecheck__(self, thing): return isinstance(thing, self._cls)
    def __copy__(self): return self
    def from_pretrained(self, *args, **kw):
        found = self._cls.from_pretrained(*args, **kw)
        if isinstance(found, tuple): return self._put(found[0]), *found[1:]
        return self._put(found)


def adapted(model, size=None):
    "With routing, and a patch of random numbers: the same for every model of these settings, whatever was drawn."
    import dmp_wb as wb
    with torch.random.fork_rng():
        patch = wb.patch(model, wb.DMPConfig(input_size=size))
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for w in patch.parameters(): w.copy_(torch.randn(w.shape, generator=g) * 0.1)
        wb.route(model)
    return model


def sizes(inputs: dict):
    "The input sizes that a patch may be of, the likely ones first."
    yield None
    shapes = [v.shape for v in inputs.values() if isinstance(v, torch.Tensor)]
    shapes += [v[0].shape for v in inputs.values() if isinstance(v, list) and v and isinstance(v[0], torch.Tensor)]
    for shape in shapes:
        if len(shape) == 5: yield from ((shape[2], *shape[3:]), (shape[1], *shape[3:]), shape[1:4])
        if len(shape) >= 4: yield from (shape[-2:], shape[-3:])
        if len(shape) == 3: yield shape[-1:]
    numbers = tuple(inputs.get(k) for k in ("num_frames", "height", "width"))
    if None not in numbers: yield numbers
    for tokens in {shape[1] for shape in shapes if len(shape) == 3}:
        for scale in (2, 1):
            for rows in range(1, tokens + 1):
                if tokens % rows == 0: yield rows * scale, tokens // rows * scale


def placed(inputs: dict) -> dict:
    "With tokens that lie row by row, which many of the tests leave to chance: a patch looks at where they are."
    ids = inputs.get("img_ids")
    if not isinstance(ids, torch.Tensor): return inputs
    tokens = ids.shape[-2]
    columns = next(n for n in range(int(tokens**0.5), 0, -1) if tokens % n == 0)
    places = torch.zeros_like(ids)
    places[..., 1] = torch.arange(tokens) // columns
    places[..., 2] = torch.arange(tokens) % columns
    return {**inputs, "img_ids": places}


def answers(make, inputs) -> bool:
    "Whether a plain model can be called."
    try:
        with torch.no_grad(): make().eval()(**inputs())
        return True
    except Exception: return False


def fitting(make, inputs):
    "The input size with which a patched model takes the inputs, as its pipeline would give them."
    from dmp_wb.core.errors import BadInput
    told = None
    for size in sizes(inputs()):
        try:
            model = adapted(make().eval(), None if size is None else list(size))
            with torch.no_grad(): model(**inputs())
            return None if size is None else list(size)
        except BadInput as e: told = told or e
        except Exception:
            if answers(make, inputs): raise
            return None   # a plain model does not answer either, where a package is missing
    raise RuntimeError(f"no size fits the inputs of the tests: {told}")


def test_of(node: str) -> str: return node.partition("::")[2]


class Exchange:
    "A plug-in of pytest: models of one class, adapted or not, and what became of every test."
    def __init__(self, name: str, only: set[str] | None):
        self.name, self.only = name, only   # tests to run on plain models; None: all, on adapted ones
        self.outcomes: dict[str, str] = {}
        self.why: dict[str, str] = {}

    def pytest_collection(self, session):
        "Tests run here that ask for an accelerator as for their speed."
        import tests.testing_utils as utils
        gc.collect = lambda *args: 0   # which they do before and after each, for a GPU's memory
        for need in ("accelerator", "torch_accelerator_with_training", "torch_accelerator"):
            setattr(utils, f"require_{need}", lambda test: test)

    @pytest.hookimpl(trylast=True)   # when marks have been looked at
    def pytest_collection_modifyitems(self, items):
        kept = [cls for cls in {i.cls for i in items} if hasattr(cls, "model_class") and self.exchanged(cls)]
        items[:] = [i for i in items if i.cls in kept and (self.only is None or test_of(i.nodeid) in self.only)]

    def exchanged(self, cls) -> bool:
        "Whether it tests the class: if so it tests others in its place from now on."
        test, found, inputs = cls(), cls.model_class, cls.get_dummy_inputs
        if isinstance(found, property): found = found.fget(test)
        if found.__name__ != self.name: return False
        cls.get_dummy_inputs = lambda self, *args, **kw: placed(inputs(self, *args, **kw))
        if self.only is None:
            size = fitting(lambda: found(**test.get_init_dict()), test.get_dummy_inputs)
            cls.model_class = Made(found, lambda model: adapted(model, size))
        return True

    def pytest_runtest_logreport(self, report):
        name, worst = test_of(report.nodeid), ("passed", "skipped", "failed")
        if worst.index(report.outcome) < worst.index(self.outcomes.get(name, "passed")): return
        self.outcomes[name] = report.outcome
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.why[name] = " ".join((crash.message if crash else str(report.longrepr)).split())[:300]


def run(name: str, files: list[str], compiled: bool, only: set[str] | None = None) -> tuple[dict, dict]:
    "In a process of its own: what becomes of the tests of one class, and what those say that fail."
    if compiled:
        whole = torch.compile
        torch.compile = lambda *args, **kw: whole(*args, **{**kw, "backend": "eager"})
    plug, said = Exchange(name, only), io.StringIO()
    with contextlib.redirect_stdout(said):
        code = pytest.main([*files, "-q", "-p", "no:cacheprovider", "-p", "no:warnings", "--tb=short",
                            "-k", "not aot and not hotswap",
                            "-m", f"not ({LEFT_OUT}){' and compile' if compiled else ' and not compile'}"],
                           plugins=[plug])
    if not plug.outcomes: raise RuntimeError(f"pytest ended with {code}: {said.getvalue()[-2000:]}")
    return plug.outcomes, plug.why


def files_of(tests: Path) -> dict[str, list[str]]:
    "The files that test each supported class, written here where there is none."
    import dmp_wb as wb
    there = {f: f.read_text(encoding="utf-8") for f in sorted(tests.glob("tests/models/*/test_models_*.py"))}
    found = {}
    for name in wb.supported_models():
        used = [f for f, text in there.items() if re.search(rf"(return|model_class =) {name}\b", text)]
        if not used:
            used = [tests / "tests" / "models" / "transformers" / f"test_models_own_{name.lower()}.py"]
            used[0].write_text(OWN_TEST.format(name=name), encoding="utf-8")
        found[name] = [str(f.relative_to(tests)) for f in used]
    return found


def artefact(test: str) -> str | None:
    "Why a test's outcome may differ, by the end of its name."
    return next((why for end, why in ARTEFACTS.items() if re.search(end, test)), None)


def apart(*args) -> tuple[dict, dict]:
    "`run` in a process of its own."
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as one: return one.submit(run, *args).result()


def each(names: list[str], tests: Path, compiled: bool):
    "The row of each class: how many tests pass, and each that ends otherwise on a plain model; or what went wrong."
    known = files_of(tests)
    for name in names:
        if name not in known: yield name, f"is no class that is supported: expected some of {', '.join(known)}"
    for name, files in known.items():
        if names and name not in names: continue
        try:
            ours, why = apart(name, files, compiled)
            rest = {test for test, outcome in ours.items() if outcome != "passed"}
            plain = apart(name, files, compiled, rest)[0] if rest else {}
            differ = {test: artefact(test) or f"{plain[test]} → {ours[test]}: {why.get(test, '')}"
                      for test in sorted(rest) if plain[test] != ours[test]}
            outcomes = list(ours.values())
            yield name, {"tests": [Path(f).name for f in files], "passed": outcomes.count("passed"),
                         "as plain": len(rest) - len(differ), "differ": differ}
        except (RuntimeError, BrokenProcessPool, KeyError) as e: yield name, str(e)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="CLASS", help="of a backbone; all of them if none is given")
    parser.add_argument("--diffusers", type=Path, required=True, help="a git clone of diffusers, a bare one too")
    parser.add_argument("--at", default="v0.40.0", help="the tag whose tests are run")
    parser.add_argument("--out", type=Path, help="a JSON file for the outcomes")
    parser.add_argument("--compiled", action="store_true", help="run the tests that compile, by the backend eager")
    args = parser.parse_args()
    out, rows, wrong = args.out and args.out.resolve(), {}, 0
    got = subprocess.run(["git", "-C", str(args.diffusers.resolve()), "archive", args.at, "tests"], capture_output=True)
    if got.returncode:
        parser.error(f"--diffusers is {args.diffusers} and --at {args.at}: expected a git clone that has this tag, "
                     f"{' '.join(got.stderr.decode(errors='replace').split())[:200]}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "-x", "-C", folder], input=got.stdout, check=True)
        sys.path[:0] = [folder, *(str(ROOT / part) for part in ("", "tests", "tools"))]
        os.chdir(folder)
        for module, text in STAND_INS.items():
            if find_spec(module) is None: Path(folder, f"{module}.py").write_text(text)
        import diffusers.models, peft, transformers   # noqa: E401, F401   once for all
        for name, row in each(args.names, Path(folder), args.compiled):
            if isinstance(row, str):
                print(f"{name}: {row}", flush=True)
                wrong += 1
                continue
            rows[name], faults = row, {k: v for k, v in row["differ"].items() if v not in ARTEFACTS.values()}
            wrong += len(faults)
            print(f"{name}: {row['passed']} pass, {row['as plain']} do not as on a plain model, "
                  f"{len(row['differ'])} differ", flush=True)
            for test, why in faults.items(): print("   ", test, why, flush=True)
            if out: out.write_text(json.dumps({"diffusers": args.at, "classes": rows}, indent=1) + "\n")
        os.chdir(ROOT)
    return 1 if wrong else 0


if __name__ == "__main__": sys.exit(main())
