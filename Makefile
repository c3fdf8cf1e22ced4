# `make demo`, `make quick` and `make test`; each sets up .venv on first use and says what it does.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
VENV ?= .venv
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?= runs/demo
BUDGET ?= 480
export PYTHONUNBUFFERED = 1
.DEFAULT_GOAL := help
.PHONY: help setup demo quick test test-notebooks test-python gpu check docs serve-docs lab notebooks readme clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## ?/\1\t/' | expand -t 18

setup: $(READY)  ## make .venv and install everything the tests and notebooks need

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10, 3.11 or 3.12 found; name one with make PYTHON=/path/to/python"; exit 1; }
	@echo "== setting up $(VENV) with $$($(PYTHON) --version) (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

PAPERMILL = $(BIN)/papermill --no-progress-bar --log-level ERROR nbs/runs
demo: $(READY)  ## pre-train, patch, fine-tune, sample, measure and see the gates: about five minutes on two cores
	@echo "== 1/7 one minute of pre-training from scratch"
	@$(PAPERMILL)/pretrain.ipynb $(DEMO)/pretrain/pretrain.ipynb -p experiment digits-quick -p overrides "train.steps=1000"
	@echo "== 2/7 fine-tuning the converged base that ships with the package: the baseline"
	@$(PAPERMILL)/pretrain.ipynb $(DEMO)/finetune/finetune.ipynb -p experiment digits-finetune -p overrides "train.steps=1000"
	@echo "== 3/7 DMP: patching the same base, its weights frozen"
	@$(PAPERMILL)/patch.ipynb $(DEMO)/dmp/patch.ipynb -p experiment digits-dmp -p overrides "train.steps=1000"
	@echo "== 4/7 sampling all three from the same seeds, and measuring"
	@$(PAPERMILL)/sample.ipynb $(DEMO)/sample/sample.ipynb -p num_images 2000 -p models "base:digits-base finetune:$(DEMO)/finetune dmp:$(DEMO)/dmp"
	@echo "== 5/7 the gates across timesteps"
	@$(PAPERMILL)/gates.ipynb $(DEMO)/gates/gates.ipynb -p model $(DEMO)/dmp
	@echo "== 6/7 real images: clothes, without and with a patch that ships"
	@$(PAPERMILL)/sample.ipynb $(DEMO)/clothes/sample.ipynb -p models "base:fashion-base patched:fashion-faded" -p reference fashion-faded -p num_images 200 -p num_shown 20 -p num_inference_steps 15
	@echo "== 7/7 one page of it all"
	@$(PAPERMILL)/report.ipynb $(DEMO)/report.ipynb
	@$(BIN)/python -m dmp_wb.batch.notebook $(DEMO)/sample
	@echo "== done: open $(DEMO)/report.html for the pictures and figures; each step has its notebook and page in $(DEMO)/"

quick: $(READY)  ## before a commit: the quick tests of every wing, and whether the sources agree; under two minutes
	@echo "== the quick tests of every wing, and the sources"
	@$(BIN)/python tools/quick.py
	@echo "== quick tests passed; make test runs all of them"

test: test-notebooks test-python  ## all tests: every notebook, then pytest
	@echo "== all tests passed; the executed pieces are in nbs/, the rest in tests/"

test-notebooks: $(READY)  ## run every notebook as a test
	@echo "== notebooks (nbdev_test)"
	@d=$$(mktemp -d) && trap 'rm -rf "$$d"' EXIT && OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE DMP_WB_RUNS=$$d MPLBACKEND=agg $(BIN)/nbdev_test --n_workers 2 --timing  # two workers with two threads each would fight over two cores

test-python: $(READY)  ## pytest
	@echo "== pytest"
	@d=$$(mktemp -d) && trap 'rm -rf "$$d"' EXIT && OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE DMP_WB_RUNS=$$d MPLBACKEND=agg $(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=8

gpu: $(READY)  ## on a machine with a CUDA device: is all correct there, and how fast; at most eight minutes, no download
	@$(BIN)/python tools/gpu.py --budget $(BUDGET)

check: $(READY)  ## notebooks and modules agree, notebooks are clean, README is current, ruff and mypy are content
	@$(BIN)/python tools/check_sources.py

docs: $(READY)  ## the site, from the notebooks, in _docs/
	@echo "== building the site"
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python docs/build.py

serve-docs: $(READY)  ## look at the site in a browser
	@test -d _docs || $(MAKE) --no-print-directory docs
	@$(BIN)/python docs/build.py --serve

lab: $(READY)  ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir=nbs

notebooks: $(READY)  ## execute the notebooks again, in place
	@echo "== executing notebooks in place"
	@rm -rf runs/notebooks && DMP_WB_RUNS=$$PWD/runs/notebooks $(BIN)/python -m jupyter nbconvert --log-level=WARN --to notebook --execute --inplace $$(ls nbs/*.ipynb nbs/concepts/*.ipynb nbs/howto/*.ipynb nbs/tutorials/*.ipynb nbs/runs/*.ipynb)
	@$(BIN)/nbdev_clean
	@$(MAKE) --no-print-directory readme

readme: $(READY)  ## write README.md from nbs/index.ipynb
	@$(BIN)/python tools/check_sources.py --write-readme

clean:  ## remove caches and built files; keeps .venv, runs/ and data/
	@rm -rf build dist *.egg-info _proc _docs jupyter_execute .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +
	@echo "clean"
