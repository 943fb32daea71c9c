# Everything here works from a fresh clone with Python 3.11 or newer and make.
#
#   make demo     install, then watch three tiers of clients train sub-networks
#   make test     install, then run the tests
#   make check    install, then formatting, lint and types
#   make bench    install, then clients a second beside a plain loop (and beside Flower
#                 and pfl, once `make bench-peers` has installed them)
#
# Variables: VENV (the environment's folder), PYTHON (which Python makes it),
# TORCH_INDEX (address of an extra package index, such as PyTorch's own for CPUs;
# without it pip takes the torch that your index serves, on Linux with CUDA),
# PEERS (the folder of the peers' environments), PYTEST_ARGS and BENCH_ARGS.

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
PEERS ?= .bench-peers

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_OPTIONS := --disable-pip-version-check --quiet --quiet \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_OPTIONS) --constraint constraints.txt

DEMO := $(BIN)/python -m subfleet demo
PEER_STAMPS := $(PEERS)/flower/.installed $(PEERS)/pfl/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check format bench bench-peers clean

help:
	@echo "make install   make the environment in $(VENV)"
	@echo "make demo      install, then run the main job on an embedded data set"
	@echo "make test      install, then run the tests (PYTEST_ARGS='-m \"not ray\"' for fewer)"
	@echo "make check     install, then check formatting, lint and types"
	@echo "make format    put the code into the house format"
	@echo "make bench     install, then measure clients a second (BENCH_ARGS='--help' tells more)"
	@echo "make bench-peers   install Flower and pfl in $(PEERS), for make bench to measure too"
	@echo "make clean     remove the environments, caches and build leftovers"

install: $(STAMP)

# The stamp is written last, so an interrupted install starts over.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "subfleet needs Python 3.11 or newer; '$(PYTHON)' is not. Set PYTHON=/path/to/python3.11" >&2; \
		exit 2; }
	@echo "Installing into $(VENV) (a minute or two) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(DEMO)

test: $(STAMP)
ifdef PYTEST_ARGS
	$(BIN)/python -m pytest $(PYTEST_ARGS)
else
	@# What starts Ray waits much of its time: it runs beside the rest.
	@log=$$(mktemp); $(BIN)/python -m pytest -m ray >$$log 2>&1 & ray=$$!; \
	$(BIN)/python -m pytest -m "not ray" --numprocesses auto --dist loadfile; status=$$?; \
	wait $$ray || status=1; \
	echo "The tests that start Ray ran meanwhile:"; cat $$log; rm -f $$log; exit $$status
endif

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/throughput.py --peers $(PEERS) $(BENCH_ARGS)

bench-peers: $(PEER_STAMPS)

$(PEERS)/%/.installed: benchmarks/peers/%_requirements.txt
	@echo "Installing $* into $(PEERS)/$* (a minute or two) ..."
	@test -x $(PEERS)/$*/bin/python || $(PYTHON) -m venv $(PEERS)/$*
	@$(PEERS)/$*/bin/python -m pip install $(PIP_OPTIONS) --requirement $<
	@touch $@

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
