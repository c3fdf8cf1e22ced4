"""A second device for tests on machines without a GPU: it computes on the CPU and refuses to mix devices, as CUDA does.

    from second_device import DEVICE, counts, reset    # torch.device("emu:0"); what was counted since `reset`

Importing it builds `second_device.cpp` once (a C++ compiler and half a minute) and registers the device for the whole
process, where `torch.accelerator` then finds it:
so it is for a process of its own, as `tests/test_second_device.py` has.
"""
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import traceback
import types
from pathlib import Path

import torch
from accelerate import PartialState
from torch.overrides import TorchFunctionMode
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_suffix(".cpp")


def compiler() -> str | None:
    "The C++ compiler: `$CXX`, else g++ or clang++; None where there is none."
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))), None)


def build() -> Path:
    "The compiled extension in `build/` beside its source; made anew for another source, torch or Python."
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {sys.version}".encode()).hexdigest()[:16]
    target = SOURCE.parent / "build" / f"second_device-{key}.so"
    if target.exists(): return target
    target.parent.mkdir(exist_ok=True)
    made = target.with_suffix(f".{os.getpid()}.tmp")
    flags = ["-std=c++20", "-O0", "-w", "-fPIC", "-shared", "-DTORCH_EXTENSION_NAME=second_device"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    flags += ["-isystem" + p for p in (*include_paths(), sysconfig.get_path("include"))]
    links = [f"-L{p}" for p in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    command = [compiler() or "c++", *flags, str(SOURCE), "-o", str(made), *links]
    try: subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as e:
        raise RuntimeError(f"{SOURCE.name} does not compile:\n{e.stderr[-2000:]}") from None
    os.replace(made, target)   # whole or not at all, whoever else builds it
    return target


def _module() -> types.ModuleType:
    "What torch asks of a device's module, as `torch.cuda` is that of CUDA's."
    class Here:
        def __init__(self, device): pass
        def __enter__(self): return self
        def __exit__(self, *error): pass

    m = types.ModuleType("torch.emu")
    nothing, always = lambda *args: None, lambda value: lambda *args: value
    m.is_available, m.is_initialized, m._is_in_bad_fork = always(True), always(True), always(False)
    m.device_count, m.current_device, m.device = always(1), always(0), Here
    m.set_device = m.synchronize = m.empty_cache = m._lazy_init = nothing
    m.manual_seed = m.manual_seed_all = m.set_rng_state = nothing
    m.get_rng_state = lambda *args: torch.zeros(1, dtype=torch.uint8)
    m.max_memory_allocated = always(0)
    m.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return m


def _swap_data():
    "torch lets tensors of CUDA and the CPU take each other's place by `.data = `, but not those of this device."
    data = torch._C.TensorBase.data

    def put(self, value):
        try: data.__set__(self, value)
        except RuntimeError:
            parameter = isinstance(self, torch.nn.Parameter)
            new = torch.nn.Parameter(value, self.requires_grad) if parameter else value.detach().clone()
            torch.utils.swap_tensors(self, new)
    torch.Tensor.data = property(lambda self: data.__get__(self), put)
    # a module that moves to CUDA keeps its parameters, which an optimiser holds; here only if torch is told so
    torch.__future__.set_swap_module_params_on_conversion(True)


def _register():
    spec = importlib.util.spec_from_file_location("second_device", build())
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    extension.init()
    torch.utils.rename_privateuse1_backend("emu")
    torch._register_device_module("emu", _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    _swap_data()
    return extension


_extension = _register()
DEVICE = torch.device("emu:0")
# accelerate looks for the kinds of devices that it knows, and takes the CPU otherwise
PartialState.default_device = property(lambda state: DEVICE)
counts, reset, strict = _extension.counts, _extension.reset, _extension.strict


def waits() -> int:
    """How often the host has waited for the device since `reset`: numbers read, copies that block, and operations whose
    shape depends on values."""
    return sum(n for kind, n in counts().items() if kind in ("item", "D2H", "H2D") or kind.startswith("wait"))


class Waiting(TorchFunctionMode):
    "Inside, `places` counts the waits by the line of the caller that they come from."
    def __init__(self, parts: tuple[str, ...] = ("dmp_wb", "diffusers", "torchjd", "accelerate")):
        super().__init__()
        self.places: dict[str, int] = {}
        self.parts = tuple(f"{os.sep}{part}{os.sep}" for part in parts)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        before = waits()
        answer = function(*args, **(kwargs or {}))
        if more := waits() - before:
            place = f"{self._place()} [{getattr(function, '__name__', function)}]"
            self.places[place] = self.places.get(place, 0) + more
        return answer

    def _place(self) -> str:
        frames = [f for f in traceback.extract_stack() if any(part in f.filename for part in self.parts)]
        if not frames: return "the caller"
        return f"{os.sep.join(frames[-1].filename.split(os.sep)[-2:])}:{frames[-1].lineno} {frames[-1].line}"
