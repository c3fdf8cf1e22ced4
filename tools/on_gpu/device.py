"The device that is measured: its clock, its memory, the waits for it, and how fast it could be."
import contextlib
import gc
import sys
import time
import warnings
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState

# operations a second in bfloat16 without sparsity, by a piece of the device's name; the first that fits
PEAKS = {"H200 NVL": 835e12, "H200": 989e12, "GH200": 989e12, "H100 NVL": 835e12, "H100 PCIE": 756e12, "H100": 989e12,
         "A100": 312e12}
SECOND_DEVICE = Path(__file__).parents[1] / "second_device"


class Skip(Exception): "Why a part cannot be run here."


def peak_of(name: str) -> float | None:
    "Operations a second of a device in bfloat16, by its name; None for one that is not in the table."
    return next((peak for piece, peak in PEAKS.items() if piece in name.upper()), None)


class Device:
    "One of `cuda`, `cpu` and `emu`, which is the second device of the tests."
    def __init__(self, kind: str):
        self.kind, self.second = kind, None
        if kind == "emu":
            sys.path.insert(0, str(SECOND_DEVICE))
            import second_device
            self.second = second_device
        self.device = torch.device(kind if kind == "cpu" else f"{kind}:0")
        self.name = torch.cuda.get_device_name() if kind == "cuda" else {"cpu": "CPU", "emu": "second device"}[kind]
        self.peak = peak_of(self.name) if kind == "cuda" else None

    @property
    def cuda(self) -> bool: return self.kind == "cuda"

    def facts(self) -> dict:
        found = {"kind": self.kind, "name": self.name, "peak_bf16_tflops": self.peak and self.peak / 1e12}
        if self.cuda:
            p = torch.cuda.get_device_properties(0)
            found |= {"count": torch.cuda.device_count(), "memory_gib": round(p.total_memory / 2**30, 1),
                      "compute_capability": f"{p.major}.{p.minor}", "cuda": torch.version.cuda,
                      "cudnn": torch.backends.cudnn.version()}
        return found

    def forget_accelerator(self, expected: str | None = None):
        "accelerate remembers the device of the training before; an error if that was not on the expected kind."
        where = PartialState._shared_state.get("device")
        AcceleratorState._reset_state(reset_partial_state=True)
        if expected is not None and where is not None and where.type != expected:
            raise AssertionError(f"the training ran on {where.type}: expected {expected}")

    def synchronize(self):
        if self.cuda: torch.cuda.synchronize()

    def clear(self):
        "Free what nobody holds any more."
        torch._dynamo.reset()
        gc.collect()
        if self.cuda: torch.cuda.empty_cache()

    def usable(self) -> bool:
        "Whether it still computes: an illegal access leaves a CUDA device useless for its process."
        try: return float(torch.ones(2, device=self.device).sum()) == 2
        except Exception: return False

    def reset_peak(self):
        if self.cuda: torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None

    @contextlib.contextmanager
    def waits(self):
        """Inside, waits for the device are counted: yields a function that gives their number so far; None on a CPU.
        CUDA tells of copies to the host, of blocking copies to the device and of numbers that are read."""
        if self.second is not None:
            self.second.reset()
            yield lambda: sum(n for name, n in self.second.counts().items() if name in ("item", "D2H", "H2D")
                              or name.startswith("wait "))
        elif self.cuda:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try: yield lambda: sum("synchroniz" in str(w.message) for w in told)
                finally: torch.cuda.set_sync_debug_mode("default")
        else: yield lambda: None


class Window:
    """When to stop a loop that calls it before each step: after some steps to warm up, `seconds` of timed ones and a
    few in which waits are counted. True: enough."""
    EVERY, COUNTED = 4, 4   # steps between looks at the clock; steps in which waits are counted

    def __init__(self, here: Device, seconds: float, warm: int = 3, most: int = 200):
        self.here, self.seconds, self.warm, self.most = here, seconds, warm, most
        self.took, self.steps, self.waits, self.last, self.held = None, 0, None, None, contextlib.ExitStack()

    def __call__(self, n: int) -> bool:
        if n < self.warm: return False
        if n == self.warm:
            self.here.reset_peak()
            self.here.synchronize()
            self.begun = time.perf_counter()
            return False
        if self.took is None:
            done = n - self.warm
            if done % self.EVERY and done < self.most: return False
            self.here.synchronize()
            took = time.perf_counter() - self.begun
            if took < self.seconds and done < self.most: return False
            self.took, self.steps, self.last, self.memory = took, done, n, self.here.peak_gib()
            self.count = self.held.enter_context(self.here.waits())
            return False
        if n < self.last + self.COUNTED: return False
        waits = self.count()
        self.waits = None if waits is None else waits / self.COUNTED
        self.held.close()
        return True

    def close(self): self.held.close()
