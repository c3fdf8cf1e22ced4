"""`wb.train` taken step by step: what a benchmark does at the beginning of each step, and where it ends the training.

    take_steps(experiment, images, labels, classes, at_step)   # at_step(n) before step n draws its batch; True ends it

The loop's own source of images is where its steps can be seen without touching it.
"""
import tempfile
import warnings
from pathlib import Path

import dmp_wb as wb
from dmp_wb.data.sources import DATASETS, ImageData, SourceEntry

NAME = "benchmark-latents"


class Enough(Exception): "The benchmark has seen what it wanted: no checkpoint, no summary."


class Watched(ImageData):
    "Images that tell of each batch that is asked for."
    at_step, number = None, 0

    def batch(self, *args, **kwargs):
        number, self.number = self.number, self.number + 1
        if self.at_step(number): raise Enough
        return super().batch(*args, **kwargs)


def watched(data: ImageData) -> Watched: return Watched(data.images, data.labels, data.class_names)


def settings(batch: int, *more: str) -> list[str]:
    "Overrides of a training that only steps: no trackers, no lines, no checkpoints on the way."
    never = 10**9
    return [f"data.name={NAME}", "data.num_workers=0", f"train.batch_size={batch}", f"train.steps={never}",
            f"train.log_every={never}", f"train.checkpoint_every={never}", "train.log_with=null", *more]


def take_steps(exp: wb.Experiment, images, labels, classes: int, at_step):
    "Train until `at_step(n)`, called before step n (from 0), gives True."
    data = Watched(images, labels, [str(i) for i in range(classes)])
    data.at_step = at_step
    DATASETS[NAME] = SourceEntry(lambda config: data)
    try:
        with tempfile.TemporaryDirectory() as d, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wb.train(exp, folder=Path(d) / "run")
    except Enough: pass
    finally: del DATASETS[NAME]
