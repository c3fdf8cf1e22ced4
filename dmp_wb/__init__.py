"Diffusion Model Patching and Denoising Task Routing as a notebook-driven research workbench."
__version__ = "0.1.0"

import os
import sys
from importlib import import_module

from ._names import MOVED

# torch reads when it is imported how its threads wait for each other: asleep, unless the user says otherwise,
# because threads that spin take the cores from all other work (core.paths.passive_waiting, for other processes)
if "torch" not in sys.modules: os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The names users type, and the module of each. They load on first use, so that `import dmp_wb` costs nothing.
_PUBLIC = {
    "DiT": "models.dit", "ModelConfig": "core.settings",
    "Anatomy": "models.anatomy", "register_backbone": "models.anatomy", "supported_models": "models.backbones",
    "check_backbone": "methods.check",
    "DMPConfig": "methods.settings", "PromptPatch": "methods.dmp", "patch": "methods.dmp", "unpatch": "methods.patches",
    "get_patch": "methods.patches",
    "save_patch": "methods.files", "load_patch": "methods.dmp", "load_reference_patch": "methods.reference",
    "use_patches": "methods.patches", "patch_disabled": "methods.patches",
    "DTRConfig": "methods.settings", "route": "methods.dtr", "unroute": "methods.dtr", "get_router": "methods.dtr",
    "routing_mask": "methods.masks",
    "diffusion_losses": "diffusion.objectives",
    "timestep_clusters": "tasks.intervals", "task_affinity": "tasks.affinity",
    "load_data": "data.load", "aspect_sizes": "data.buckets",
    "Method": "methods.base", "ModuleMethod": "methods.base", "Panel": "methods.base",
    "methods_of": "methods.base", "apply_methods": "methods.base", "intervene": "methods.interventions",
    "register_method": "methods.registry", "register_gate": "methods.registry", "register_mask": "methods.registry",
    "load_plugin": "methods.registry",
    "list_runs": "store.listing",
    "Experiment": "config.experiment", "load_experiment": "config.reading",
    "Run": "store.run", "open_run": "store.run", "load_model": "store.run",
    "train": "training.loop", "launch": "training.launching",
    "respace": "diffusion.schedules",
    "sample": "diffusion.sampling", "sample_trajectory": "diffusion.sampling", "sample_run": "evaluation.sample_files",
    "posterior": "diffusion.sampling",
    "evaluate": "evaluation.evaluate", "evaluate_run": "evaluation.evaluate", "guidance_sweep": "evaluation.evaluate",
    "effects": "evaluation.effects", "transfer": "evaluation.effects",
    "sample_effects": "evaluation.sample_effects",
    "load_extractor": "evaluation.extractors", "reference_statistics": "evaluation.statistics",
    "frechet_distance": "evaluation.distances", "kernel_distance": "evaluation.distances",
    "inception_score": "evaluation.distances", "precision_recall": "evaluation.distances",
    "density_coverage": "evaluation.distances",
    "sweep": "batch.sweep",
    "BadInput": "core.errors",
}
_MODULES = ("core", "models", "methods", "diffusion", "tasks", "data", "config", "store", "training", "evaluation",
            "batch", "look", "cli", *MOVED)
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    if name in _PUBLIC: return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    if name in _MODULES: return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__(): return sorted([*__all__, *_MODULES])
