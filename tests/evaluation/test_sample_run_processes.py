"Two processes share a job of samples and are killed."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from test_sample_run import files, make_run

import dmp_wb as wb
from dmp_wb.evaluation.sample_files import sample_run, SAMPLES_FILE

JOB = dict(num_images=120, batch_size=4, num_inference_steps=12, device="cpu", quiet=True)
WORKER = f"""
import sys
from dmp_wb.sampling import sample_run
print(sample_run(sys.argv[1], folder=sys.argv[2], **{JOB!r}))
"""


def test_two_processes_killed_and_resumed(tmp_path):
    "SIGKILL at an arbitrary moment; the files equal those of one process that nobody touched."
    run, folder, root = make_run(tmp_path / "run"), tmp_path / "out", str(Path(wb.__file__).parents[1])
    pngs = lambda: len(list(folder.glob("[0-9]*.png")))
    start = lambda: [subprocess.Popen(
        [sys.executable, "-c", WORKER, str(run), str(folder)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "RANK": str(r), "WORLD_SIZE": "2"})
                     for r in range(2)]
    workers = start()
    while pngs() < 10 and any(w.poll() is None for w in workers): time.sleep(0.002)
    for w in workers: w.send_signal(signal.SIGKILL)
    assert (-signal.SIGKILL in [w.wait() for w in workers] and 10 <= pngs() < 120
            and not (folder / SAMPLES_FILE).exists())
    workers = start()
    said = [w.communicate()[0].strip() for w in workers]
    assert [w.returncode for w in workers] == [0, 0] and str(folder) in said and set(said) <= {str(folder), "None"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: alone = sample_run(run, folder=tmp_path / "alone", part=(0, 1), **JOB)
    finally: torch.set_num_threads(threads)
    assert files(alone) == files(folder) and len(files(folder)) == 122
