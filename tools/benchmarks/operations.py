"""How many operations a patch adds to a forward pass of every class of backbone that is supported: counted, not timed.

`python tools/benchmarks/operations.py [NAME …]`: the tiny models of the tests, patched with the default settings,
called with one timestep for the batch as in sampling. An operation is a multiplication with its addition in a product
of matrices, a convolution or an attention, or one number that any other kernel writes; views cost nothing. Prints, for
each class, patched / plain where the gates are computed, the same where they come from a table, and how many kernels
are added.
"""
import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
VIEWS = {"view", "_unsafe_view", "expand", "t", "transpose", "permute", "unsqueeze", "squeeze", "slice", "select",
         "detach", "alias", "split", "split_with_sizes", "unbind", "chunk", "as_strided", "_reshape_alias"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}   # which FlopCounterMode counts


class Written(TorchDispatchMode):
    "Counts kernels, and the numbers that those write which are no products."
    def __init__(self):
        super().__init__()
        self.kernels = self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name not in VIEWS:
            self.kernels += 1
            if name not in PRODUCTS:
                self.numbers += sum(o.numel() for o in (out if isinstance(out, (tuple, list)) else [out])
                                    if isinstance(o, torch.Tensor))
        return out


@torch.no_grad()
def counted(call) -> tuple[int, int]:
    "Operations and kernels of a call."
    with sdpa_kernel(SDPBackend.MATH):   # an attention is then made of products that are counted
        with FlopCounterMode(display=False) as flops: call()
        with Written() as written: call()
    return flops.get_total_flops() // 2 + written.numbers, written.kernels


def added(model, inputs: dict, input_size) -> tuple[float, float, int]:
    "Operations of a patched forward over those of a plain one, without and with a table; kernels that are added."
    import dmp_wb as wb
    from dmp_wb.methods.check import output_of, Subject
    from dmp_wb.models.backbones import anatomy_of
    subject = Subject(model, inputs, anatomy_of(model), input_size)
    called = {**inputs, **subject.at(torch.full((2,), 800.0))}
    call = lambda: output_of(model, called)
    plain, kernels = counted(call)
    with subject.patched() as patch:
        patched, more = counted(call)
        with patch.baked([800.0]): table, _ = counted(call)
    assert wb.methods_of(model) == {}
    return patched / plain, table / plain, more - kernels


def cases() -> dict:
    "Name → model, inputs and their size, of every tiny model in the tests."
    sys.path.insert(0, str(ROOT / "tests"))
    from backbones import BACKBONES, INPUT_SIZE, inputs_for
    from more_backbones import build, CASES
    old = {n: (BACKBONES[n], lambda n=n: inputs_for(n), INPUT_SIZE.get(n)) for n in BACKBONES}
    return old | {n: (lambda n=n: build(n), inputs, size) for n, (_, inputs, size) in CASES.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; all classes if none")
    names, rows = parser.parse_args().names, []
    for name, (build, inputs, size) in cases().items():
        if names and not any(part in name for part in names): continue
        rows.append(added(build(), inputs(), size))
        print(f"{name:36} {rows[-1][0]:.4f}  table {rows[-1][1]:.4f}  {rows[-1][2]:+4} kernels", flush=True)
    for label, ratios in zip(("gates computed", "from a table"), list(zip(*rows))[:2]):
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        print(f"{label}: {middle:.4f} × plain ({low:.4f} to {high:.4f}), at most {max(ratios):.4f}")


if __name__ == "__main__": main()
