# Everything runs in .venv; each target sets up what it needs and may be repeated.
PYTHON ?= $(shell command -v python3.13 || command -v python3.12 || command -v python3.11 || echo python3)
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test check bench setup clean

setup: $(READY)

$(READY): scripts/install.py setup.py vllm_twist/__init__.py
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) scripts/install.py
	@touch $@

demo: $(READY)          ## plain and twisted samples of the shipped model, side by side
	@$(RUN) -m examples.demo

test: $(READY)          ## every test
	$(RUN) -m pytest

check: $(READY)         ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(READY)         ## tokens per second, twisted against plain
	$(RUN) -m benchmarks.bench_generate --csv benchmarks/results/generate.csv

clean:
	rm -rf $(VENV) build *.egg-info
