"""What one runs before a commit: the quick tests of every wing, and beside them the check of the sources.

    python tools/quick.py           # or `make quick`
    python tools/quick.py --tests   # without the check of the sources

Of each wing the tests that take a moment; `make test` runs all of them.
"""
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Whole files, and of files that take longer the tests that do not.
TESTS = """
tests/core/test_core.py tests/core/test_values.py
tests/models/test_dit.py tests/models/test_model_files.py
tests/methods/test_hooks.py tests/methods/test_patching.py tests/methods/test_routing.py
tests/diffusion/test_schedules.py tests/diffusion/test_objectives.py
tests/diffusion/test_sampling.py::test_guidance_is_the_papers_formula
tests/diffusion/test_sampling.py::test_posterior_is_the_papers
tests/diffusion/test_sampling.py::test_kept_steps
tests/tasks/test_multitask.py
tests/data/test_data_splits.py
tests/data/test_data.py::test_the_crop_is_adms
tests/data/test_data.py::test_labels_are_first_subfolders
tests/data/test_data.py::test_a_batch_is_a_function_of_its_indices
tests/test_config.py
tests/store/test_folders.py
tests/training/test_training.py::test_a_routed_run_loads_routed
tests/training/test_training.py::test_dmp_leaves_the_backbone_alone_and_keeps_state_for_the_patch_only
tests/training/test_training.py::test_split_and_join
tests/training/test_training.py::test_keep_last
tests/training/test_training.py::test_which_checkpoints_stay
tests/evaluation/test_metrics.py::test_frechet_properties
tests/evaluation/test_metrics.py::test_kid_subsets
tests/evaluation/test_metrics.py::test_inception_score_properties
tests/evaluation/test_metrics.py::test_evaluate_is_the_sum_of_its_parts
tests/batch/test_slurm_options.py
tests/batch/test_sweeps.py::test_a_grid
tests/batch/test_sweeps.py::test_bad_plans
tests/batch/test_sweeps.py::test_bad_files
tests/look/test_compare.py::test_what_differs
tests/look/test_compare.py::test_tables_escape_what_they_show
tests/look/test_explore.py::test_gates_follow_timestep_block_and_class
tests/test_cli.py::test_the_names_that_the_command_knows_are_those_of_the_modules
tests/test_cli.py::test_numbers_below_the_least_are_named
""".split()
USUAL = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MPLBACKEND": "agg"}


def main() -> int:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as runs:
        env = {**USUAL, **os.environ, "DMP_WB_RUNS": runs}
        check = None
        if "--tests" not in sys.argv:
            check = subprocess.Popen([sys.executable, "tools/check_sources.py"], cwd=ROOT, env=env, text=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "not slow", *TESTS], cwd=ROOT, env=env)
        said = check.communicate()[0] if check else ""
    print(said, end="")
    print(f"{time.monotonic() - begun:.0f} s")
    return tests.returncode or (check.returncode if check else 0)


if __name__ == "__main__": sys.exit(main())
