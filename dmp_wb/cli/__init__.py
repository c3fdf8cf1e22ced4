"The `dmp-wb` command."
from .base import app
from .looking import compare, list_runs, main, run
from .making import latents, new, sample, train
from .measuring import evaluate, guidance

__all__ = ["app", "compare", "evaluate", "guidance", "latents", "list_runs", "main", "new", "run", "sample", "train"]
