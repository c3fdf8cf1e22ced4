"""How often the host waits for the device: per forward pass, per step of sampling, per step of training.

    python tools/second_device/waits.py [forward] [sampling] [training] [--where] [--json FILE]

A wait is a number that is read, a copy that blocks, or an operation whose shape depends on values: while it lasts the
host gives the device no work. The second device counts them as CUDA would have them. `--where` names their lines.
"""
import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests")]

import torch  # noqa: E402
from second_device import DEVICE, reset, waits, Waiting  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

from backbones import BACKBONES, INPUT_SIZE, inputs_for  # noqa: E402
from conftest import tiny_dit  # noqa: E402
import dmp_wb as wb  # noqa: E402
from dmp_wb.core.settings import FLOW_SAMPLERS, SAMPLERS  # noqa: E402
from dmp_wb.methods.base import apply_methods  # noqa: E402
from dmp_wb.methods.interventions import Adapter  # noqa: E402
from dmp_wb.methods.registry import method_entry  # noqa: E402

METHODS = {
    "dmp": ("dmp", {}), "dmp, condition": ("dmp", {"gate_input": "timestep+condition"}),
    "dmp, noisy top 2": ("dmp", {"noisy_gating": True, "top_k": 2}), "dmp, mlp": ("dmp", {"gate": "mlp"}),
    "dmp, prepend": ("dmp", {"mode": "prepend", "num_prompts": 4}), "prompt-tuning": ("prompt-tuning", {}),
    "dtr": ("dtr", {}), "dtr, random": ("dtr", {"kind": "random"}), "lmask": ("lmask", {}), "switch": ("switch", {}),
    "tlora": ("tlora", {}), "tlora, rank": ("tlora", {"form": "rank"}),
}
TIMES = torch.arange(999, -1, -100)


def to_device(value):
    "Tensors of a value, on the device."
    if isinstance(value, torch.Tensor): return value.to(DEVICE)
    if isinstance(value, dict): return {k: to_device(v) for k, v in value.items()}
    return type(value)(map(to_device, value)) if isinstance(value, (tuple, list)) else value


def counted(run: Callable, where: bool = False) -> int:
    "The waits of the second of two runs: what is made once is made in the first."
    run()
    reset()
    with Waiting() if where else contextlib.nullcontext() as found: run()
    for place, n in found.places.items() if found else (): print(f"    {n} × {place}")
    return waits()


def backbone_forwards(name: str) -> Iterator[tuple[str, Callable]]:
    "Forward passes of a backbone's tiny model: plain, patched, at half strength, from a table, and with a route."
    inputs, shared = to_device(inputs_for(name)), to_device(inputs_for(name, timestep=500))

    def forward(given=inputs):
        with torch.no_grad(): return model(**given)
    model = BACKBONES[name]().to(DEVICE)
    yield "plain", forward
    patch = wb.patch(model, wb.DMPConfig(init="random", input_size=INPUT_SIZE.get(name)))
    yield "patched", forward
    patch.strength = 0.5
    yield "patched, half", forward
    with patch.baked(torch.tensor([500])): yield "baked", lambda: forward(shared)
    wb.route(model)
    yield "both", forward
    wb.unpatch(model)
    yield "routed", forward


def on_dit(name: str) -> tuple[torch.nn.Module, Any]:
    "A tiny DiT with one of the `METHODS`, and the method."
    model, (method, settings) = tiny_dit(), METHODS[name]
    found = apply_methods(model, {method: method_entry(method).made(**settings)})
    return model, next(iter(found.values()))


def method_forwards(name: str) -> Iterator[tuple[str, Callable]]:
    "Forward passes of a DiT with a method: of sampling, and of training with its backward pass and losses."
    model, acting = on_dit(name)
    model.to(DEVICE)
    given = to_device(dict(hidden_states=torch.randn(4, 1, 8, 8), timestep=torch.tensor([3, 300, 600, 999]),
                           class_labels=torch.tensor([0, 4, 9, 10])))
    shared = {**given, "timestep": torch.tensor(899, device=DEVICE).expand(4)}

    def sampling():
        with torch.no_grad(): model(**shared)

    def training():
        loss = model(**given).sample.square().mean()
        for value, weight in acting.losses().values(): loss = loss + weight * value
        if loss.requires_grad: loss.backward()
    model.eval()
    if isinstance(acting, Adapter) and name != "dmp, prepend": acting.strength = 0.5
    with acting.prepared(TIMES): yield "sampling", sampling
    if isinstance(acting, torch.nn.Module): acting.train()
    yield "training", training


def forward_waits(where: bool = False) -> dict[str, dict[str, int]]: # model or method → kind → waits a pass
    "The waits of forward passes."
    found: dict[str, dict[str, int]] = {}
    for names, forwards in ((BACKBONES, backbone_forwards), (METHODS, method_forwards)):
        for name in names:
            for kind, forward in forwards(name):
                if where: print(f"{name}, {kind}")
                found.setdefault(name, {})[kind] = counted(forward, where)
    return found


def sampling_waits(where: bool = False) -> dict[str, dict[str, float]]: # sampler → kind → waits a step
    "The waits of a step of each sampler: those that two more steps add."
    found: dict[str, dict[str, float]] = {}
    for sampler in SAMPLERS:
        flow = {"prediction_type": "flow_prediction"} if sampler in FLOW_SAMPLERS else {}
        for kind in ("plain", "patched", "patched and routed"):
            model = tiny_dit().to(DEVICE)
            if kind != "plain": wb.patch(model, wb.DMPConfig(init="random"))
            if kind == "patched and routed": wb.route(model)

            def sample(steps: int, model=model, sampler=sampler, flow=flow):
                wb.sample(model, 2, guidance_scale=2.0, sampler=sampler, num_inference_steps=steps, quiet=True, **flow)
            if where: print(f"{sampler}, {kind}, ten steps")
            few, many = counted(lambda: sample(6)), counted(lambda: sample(10), where)
            found.setdefault(sampler, {})[kind] = (many - few) / 4
    return found


RUNS = {
    "pretrain": [], "dmp": ["base=digits-base", "methods={dmp: {}}"],
    "prompt-tuning": ["base=digits-base", "methods={prompt-tuning: {}}"], "dtr": ["methods={dtr: {}}"],
    "lmask": ["methods={lmask: {}}"], "switch": ["methods={switch: {}}"],
    "tlora": ["base=digits-base", "methods={tlora: {}}"],
    "uncertainty weighting": ["multitask.method=uw", "multitask.k=4"],
    "clipped, accumulated": ["optim.max_grad_norm=1.0", "train.gradient_accumulation_steps=2"],
}


def train_run(name: str, folder: Path, overrides: list[str]):
    "A short training of one of the `RUNS`, on the device."
    return wb.train("digits-quick", ["name=waits", "train.batch_size=8", "train.log_every=100", "train.cpu=false",
                                     "train.log_with=null", *RUNS[name], *overrides], folder)


def training_waits(where: bool = False) -> dict[str, float]: # run → waits a step
    "The waits of a step of training, from one step of the optimiser to the next; without a line of metrics."
    found = {}
    for name in RUNS:
        marks: list[int] = []
        if where: print(f"{name}, a whole run of 6 steps")
        handle = register_optimizer_step_post_hook(lambda *args, marks=marks: marks.append(waits()))
        with Waiting() if where else contextlib.nullcontext() as traced, tempfile.TemporaryDirectory() as folder:
            try: train_run(name, Path(folder) / "run", ["train.steps=6"])
            finally: handle.remove()
        for place, n in traced.places.items() if traced else (): print(f"    {n} × {place}")
        found[name] = max(b - a for a, b in zip(marks[1:], marks[2:]))
    return found


def table(rows: dict[str, dict[str, float]], title: str) -> str:
    "As Markdown."
    kinds = list(dict.fromkeys(k for row in rows.values() for k in row))
    lines = [f"| {title} | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(f"{row[k]:g}" if k in row else "" for k in kinds) + " |"
                                for name, row in rows.items())])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="forward, sampling, training; all three if none is given")
    parser.add_argument("--where", action="store_true", help="name the lines that wait")
    parser.add_argument("--json", help="write the numbers to this file too")
    args = parser.parse_args()
    wanted, found = args.what or ["forward", "sampling", "training"], {}
    if "forward" in wanted: found["forward"] = forward_waits(args.where)
    if "sampling" in wanted: found["sampling"] = sampling_waits(args.where)
    if "training" in wanted: found["training"] = {k: {"a step": n} for k, n in training_waits(args.where).items()}
    for what, rows in found.items(): print(table(rows, f"waits, {what}"), end="\n\n")
    if args.json: Path(args.json).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__": main()
