"Diffusion Model Patching and Denoising Task Routing as a notebook-driven research workbench."
__version__ = "0.1.0"

from importlib import import_module

# The names users type, and the module of each. They load on first use, so that `import dmp_wb` costs nothing.
_PUBLIC = {
    "DiT": "dit", "ModelConfig": "settings",
    "Anatomy": "anatomy", "register_backbone": "anatomy", "supported_models": "anatomy",
    "DMPConfig": "settings", "PromptPatch": "patching", "patch": "patching", "unpatch": "patching", "get_patch": "patching",
    "save_patch": "patching", "load_patch": "patching", "load_reference_patch": "patching", "use_patches": "patching", "patch_disabled": "patching",
    "DTRConfig": "settings", "route": "routing", "unroute": "routing", "get_router": "routing", "routing_mask": "routing",
    "diffusion_losses": "objectives",
    "timestep_clusters": "multitask", "task_affinity": "multitask",
    "load_data": "data",
    "list_runs": "folders",
    "Experiment": "config", "load_experiment": "config",
    "Run": "checkpoints", "open_run": "checkpoints", "load_model": "checkpoints",
    "train": "training", "launch": "launching",
    "respace": "schedules",
    "sample": "sampling", "sample_trajectory": "sampling", "sample_run": "sampling", "posterior": "sampling",
    "evaluate": "metrics", "evaluate_run": "metrics", "guidance_sweep": "metrics", "load_extractor": "metrics", "reference_statistics": "metrics",
    "frechet_distance": "metrics", "kernel_distance": "metrics", "inception_score": "metrics", "precision_recall": "metrics", "density_coverage": "metrics",
    "sweep": "sweeps",
    "BadInput": "core",
}
_MODULES = ("core", "values", "folders", "settings", "schedules", "dit", "anatomy", "hooks", "patching", "routing", "objectives", "multitask", "data", "config", "checkpoints", "distributed", "training", "sampling", "metrics", "viz", "explore", "compare", "launching", "runs", "slurm", "sweeps", "projects", "cli")
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    if name in _PUBLIC: return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    if name in _MODULES: return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__(): return sorted([*__all__, *_MODULES])
