"""Names that are found in a room when they are first used:
those of a wing, and the modules that were flat before there were wings.

`from dmp_wb.core import BadInput` asks the rooms of that wing
one after the other, and `from dmp_wb.metrics import evaluate`
those that hold today what that module held.
"""
import importlib.abc
import importlib.util
import pkgutil
import sys
from importlib import import_module

# What was one module before version 0.2, and where its parts are; scripts written for it go on.
MOVED = {
    "anatomy": ("models.anatomy", "models.backbones"),
    "checkpoints": ("store.checkpoints", "store.run"),
    "compare": ("look.compare", "look.tables", "evaluation.draw"),
    "distributed": ("training.distributed",),
    "dit": ("models.dit", "models.weights", "core.settings"),
    "explore": ("look.explore", "look.widgets", "diffusion.predict"),
    "folders": ("store.listing", "core.files", "core.processes", "core.values"),
    "hooks": ("methods.hooks",),
    "launching": ("training.launching",),
    "metrics": ("evaluation.evaluate", "evaluation"),
    "multitask": ("tasks", "core.settings"),
    "objectives": ("diffusion.objectives", "core.settings"),
    "patching": ("methods.dmp", "methods.patches", "methods.prompts", "methods.files", "methods.reference",
                 "methods.gates",
                 "methods.weights", "methods.settings"),
    "projects": ("batch.projects",),
    "routing": ("methods.dtr", "methods.masks", "methods.settings"),
    "runs": ("batch.engine", "batch"),
    "sampling": ("diffusion.sampling", "diffusion.walk", "evaluation.sample_files", "evaluation.draw", "data.load"),
    "schedules": ("diffusion.schedules", "models.anatomy", "core.settings"),
    "settings": ("core.settings", "methods.settings"),
    "slurm": ("batch.slurm",),
    "sweeps": ("batch.sweep", "batch"),
    "values": ("core.values",),
    "viz": ("look.viz",),
}
COMMANDS = {"runs": "batch.notebook"}   # what `python -m` of an old module runs


def rooms(places) -> list[str]:
    "The full names of modules, a wing standing for all of its rooms."
    found = []
    for place in places:
        spec = importlib.util.find_spec(f"dmp_wb.{place}")
        inside = [r.name
                  for r in pkgutil.iter_modules(spec and spec.submodule_search_locations or []) if r.name[0] != "_"]
        found += [f"dmp_wb.{place}.{r}" for r in inside] or [f"dmp_wb.{place}"]
    return found


def finder_of(module: str, places):
    "A module's `__getattr__`, which looks for a name in the rooms of these places."
    def find(name: str):
        if not name.startswith("__"):
            for room in rooms(places):
                if hasattr(held := import_module(room), name): return getattr(held, name)
            # a room that nobody has imported yet, as wb.look.viz
            if (room := f"{module}.{name}") in rooms(places): return import_module(room)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return find


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    "Finds the modules of `MOVED` under their old names."
    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.partition(".")
        return importlib.util.spec_from_loader(fullname, self) if package == "dmp_wb" and name in MOVED else None

    def get_source(self, fullname):
        name = fullname.partition(".")[2]
        source = f"from dmp_wb._names import MOVED, finder_of\n__getattr__ = finder_of({fullname!r}, MOVED[{name!r}])\n"
        if name in COMMANDS:
            source += (f"if __name__ == '__main__': import runpy; runpy.run_module('dmp_wb.{COMMANDS[name]}', "
                       f"run_name='__main__')\n")
        return source

    def is_package(self, fullname): return False


sys.meta_path.append(MovedModules())
