# `make` lists the targets. Each sets up what it needs: .venv, once.

NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
# The first of these that is; another: make PYTHON=/path/to/python3
PYTHON := $(or $(shell for name in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$name $(NEW_ENOUGH) 2>/dev/null && echo $$name && break; done),python3)
BIN := .venv/bin
SANDBOX := $(BIN)/sandbox
# One more than there are cores, for a test of several processes waits for some of its time. Another: make test JOBS=4
JOBS := $(shell expr 1 + $$(getconf _NPROCESSORS_ONLN))
PYTEST := $(BIN)/pytest --numprocesses $(JOBS) --dist worksteal
SHORT := --set train.steps=60
RUNS := unsharded ddp zero1 zero2 zero3 fsdp

# Or every process that tests start compiles the sources anew.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: help demo test lint fast unit parity slow compositions engines pages recovery thorough cluster bench picture pictures docker clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.installed  ## Train unsharded, DDP, ZeRO 1 to 3 and FSDP, verify every config, draw runs/report.html
	set -e; for name in $(RUNS); do $(SANDBOX) run configs/$$name.yaml $(SHORT); done
	$(SANDBOX) verify configs/*.yaml --json runs/verdicts.json
	$(SANDBOX) report $(RUNS:%=runs/%) runs/verdicts.json --reference runs/unsharded --out runs/report.html

test: lint fast  ## Lint, types, import contracts, and every strategy of native and torch by itself

lint: .venv/.installed  ## ruff, mypy, import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

SLOW := compositions or engines or pages or recovery
APART := thorough or cluster

# Of both tiers at once: to collect tests takes its time too.
fast: .venv/.installed
	$(PYTEST) -m "unit or not ($(SLOW) or $(APART))"

unit: .venv/.installed  ## Tests of one process
	$(PYTEST) -m unit

parity: .venv/.installed  ## Tests of several processes, but for those below
	$(PYTEST) -m "parity and not ($(SLOW) or $(APART))"

slow: .venv/.installed  ## The next four at once; a quarter of an hour
	$(PYTEST) -m "($(SLOW)) and not ($(APART))"

compositions: .venv/.installed  ## Plans of two to five axes, on up to 32 ranks; five minutes
	$(PYTEST) -m "compositions and not engines"

engines: .venv/.installed  ## FairScale, Accelerate and DeepSpeed, and models of Hugging Face; five minutes
	$(PYTEST) -m engines

pages: .venv/.installed  ## Every command that the pages in docs show, and the long ones of the README; three minutes
	$(PYTEST) -m pages

recovery: .venv/.installed  ## Ranks, disks and torchrun's agents that fail; two minutes
	$(PYTEST) -m "parity and recovery and not ($(APART))"

thorough: .venv/.installed  ## Corners of each strategy, plans and faults drawn at random; half an hour
	$(PYTEST) -m "parity and thorough and not engines" --draws 200

cluster: .venv/.installed  ## Hosts emulated on this machine, and a cluster of containers; as root, five minutes
	docker/install.sh
	$(BIN)/pytest -m cluster

bench: .venv/.installed  ## Step time, bytes and memory against every library, each axis against torch, bubbles
	failed=0; for name in step_time engines axes ring bubble trainer_overhead desync_overhead turns; do \
		$(BIN)/python benchmarks/$$name.py || failed=1; done; exit $$failed

picture: .venv/.installed  ## Draw docs/hero.png and write docs/engines.md from `sandbox verify --all`
	mkdir -p runs
	$(SANDBOX) verify --all --json runs/all.json
	$(SANDBOX) report runs/all.json --out runs/all.html --picture docs/hero.png --table docs/engines.md

pictures: .venv/.installed  ## Draw docs/pictures from what the strategies say of themselves
	$(BIN)/python docs/draw.py

docker: .venv/.installed  ## Build the image, and verify a config in a cluster of its containers
	PYTHON=$(BIN)/python docker/build.sh --twice
	PATH="$(CURDIR)/$(BIN):$$PATH" docker/cluster.sh

clean:  ## Remove .venv, runs and caches
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Compiled afterwards, for pip would use one core; what torch's tests have for a later Python fails.
.venv/.installed: pyproject.toml
	@$(PYTHON) $(NEW_ENOUGH) || { echo "Python 3.11 or newer is needed, and $(PYTHON) is not it." \
		"Name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --editable '.[dev]'
	$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true
	touch $@
