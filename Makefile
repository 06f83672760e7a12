# `make demo` and `make test` set up .venv by themselves; nothing is done twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHECKPOINT := checkpoints/demo
BUNDLE := out/demo-bundle

.PHONY: demo test lint gpu clean

demo: $(READY)
	mkdir -p out
	$(BIN)/trip-export $(CHECKPOINT) -o $(BUNDLE)
	$(BIN)/trip-animate $(BUNDLE) --batch examples/demo.jsonl --contact-sheet out/demo.png

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine whose own python has torch for its GPU, that one is used as it is.
gpu:
	@if $(PYTHON) -c 'import msgspec, torch, tqdm, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then python=$(PYTHON); \
	elif nvidia-smi -L >/dev/null 2>&1; then $(MAKE) --no-print-directory $(READY) && python=$(BIN)/python; \
	else echo "gpu: found no NVIDIA GPU, expected one; python bench/gpu/run.py --dry-run shows what would be done" >&2; exit 2; fi; \
	PYTHONPATH=.:kernels:export:engines:$$PYTHONPATH $$python bench/gpu/run.py $(ARGS)

$(READY): pyproject.toml requirements/constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11) else f"trip-rt needs Python 3.11 or newer, found {v}; name one with PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c requirements/constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out
