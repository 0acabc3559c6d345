# Everything runs from `.venv`, which the first target that needs it makes from the exact pins in
# requirements/. `make demo` and `make test` each start from a clean clone.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup demo recipes test test-full lint format clean

ifndef LOCK
LOCK := requirements/$(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),gpu,cpu).txt
endif
LOCK_NAME := $(basename $(notdir $(LOCK)))
INSTALLED := .venv/.installed-$(LOCK_NAME)-$(shell cat $(LOCK) pyproject.toml | sha256sum | cut -c1-16)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

PIP := .venv/bin/python -m pip --disable-pip-version-check
CODE := $(foreach folder,platform/journeyman jobs serve,$(if $(wildcard $(folder)/*.py),$(folder)))
ARGS ?=
RECIPE ?= routing
CERTIFIED := routing policy filtering retrieval
WRITING := rationales logits
BALANCED := --set name=policy-balanced --set 'corpus.where={mix: [realistic, balanced]}' \
	--set 'labels.class_shares={answer: 0.5, refuse: 0.5}'
ANSWERS := --set name=rationales-answers --set training.rationale_weight=0
RUNS := $(CERTIFIED) policy-balanced $(WRITING) rationales-answers
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3)

help:  ## show this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

setup: $(INSTALLED)  ## make .venv with the pinned packages and journeyman itself (LOCK=requirements/cpu.txt chooses)
	@echo "Ready: .venv has the packages of $(LOCK) and journeyman"

demo: $(INSTALLED)  ## distil, certify and serve small models on this machine (RECIPE=policy: another of jobs/recipes/)
	@.venv/bin/journeyman run jobs/recipes/$(RECIPE).yaml $(ARGS)

# One after another, each skipped where it is done for the same inputs.
recipes: $(INSTALLED)  ## run every recipe, two of them in both ways, and write docs/results.md and the README's table from what came of them
	@for recipe in $(CERTIFIED) $(WRITING); do
		.venv/bin/journeyman run jobs/recipes/$$recipe.yaml $(ARGS)
	done
	.venv/bin/journeyman run jobs/recipes/policy.yaml $(BALANCED) $(ARGS)
	.venv/bin/journeyman run jobs/recipes/rationales.yaml $(ANSWERS) $(ARGS)
	.venv/bin/journeyman results $(RUNS:%=runs/%) --to docs/results.md --into README.md

test: $(INSTALLED)  ## run the tests but those marked slow (ARGS= goes to pytest)
	@.venv/bin/python -m pytest -m "not slow" $(ARGS)

test-full: $(INSTALLED)  ## run all tests, chaos and load included (ARGS= goes to pytest)
	@.venv/bin/python -m pytest $(ARGS)

lint: $(INSTALLED)  ## check style (ruff), format (ruff) and types (mypy)
	@.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy $(CODE)

format: $(INSTALLED)  ## rewrite the code in the project's format
	@.venv/bin/ruff check --fix-only --quiet .
	.venv/bin/ruff format .

clean:  ## remove .venv, caches and build artefacts (runs/ stays)
	@rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist platform/*.egg-info
	find $(wildcard platform jobs serve tests) -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, and named after what was installed: a changed lock or pyproject.toml
# installs again. A set-up that was cut off, or the other lock's environment (both vLLMs own one
# module name), starts anew. The lock on this file keeps two `make`s from installing at once.
$(INSTALLED):
	@exec 9<Makefile
	flock 9
	[[ ! -e $@ ]] || exit 0
	for stamp in .venv/.installing .venv/.installed-*; do
		[[ ! -e $$stamp || $$stamp == .venv/.installed-$(LOCK_NAME)-* ]] || { rm -rf .venv; break; }
	done
	if [[ ! -x .venv/bin/python ]]; then
		supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'
		for python in $(PYTHONS); do
			if $$python -c "$$supported" 2>/dev/null; then found=$$python; break; fi
		done
		if [[ -z $${found:-} ]]; then
			echo "Journeyman needs Python 3.11 or 3.12; tried and found neither: $(PYTHONS)." \
				"Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2
			exit 1
		fi
		mkdir -p .venv && touch .venv/.installing
		$$found -m venv .venv
	fi
	rm -f .venv/.installed-* && touch .venv/.installing
	echo "Installing $$(grep -c == $(LOCK)) pinned packages from $(LOCK): some minutes the first time (log: .venv/install.log)"
	log_of() { "$$@" >>.venv/install.log 2>&1; }
	failed() {
		(( $$? >= 128 )) || rm .venv/.installing  # pip gave up by itself, and left nothing half done
		tail -n 20 .venv/install.log >&2
		echo "Set-up failed at: $$1. Log: .venv/install.log" >&2
		exit 1
	}
	trap 'exit 130' INT TERM
	: >.venv/install.log
	# A CPU build of torch lies on PyTorch's own index. Asked for only if pip finds none without it,
	# and then not for long: a machine without that index has torch in a mirror or a folder of wheels.
	torch=$$(grep -E '^torch==.*\+cpu$$' $(LOCK) || true)
	if [[ -n $$torch ]]; then
		log_of $(PIP) install --no-deps "$$torch" \
			|| log_of $(PIP) --timeout 15 --retries 1 install --no-deps --extra-index-url $(TORCH_CPU_INDEX) "$$torch" \
			|| failed "install $$torch, from pip's own indexes or $(TORCH_CPU_INDEX)"
	fi
	log_of $(PIP) install --no-deps -r $(LOCK) || failed "install the packages of $(LOCK)"
	log_of $(PIP) install --no-deps --no-build-isolation --editable . || failed "install journeyman itself"
	rm .venv/.installing && touch $@
