# make demo    set everything up, run the main job on the embedded model and data (about 10 minutes on 2 cores)
# make test    set everything up, run the tests (no network needed after the set-up)
# make check   what CI checks besides: format, lint, types
# make verdicts    `burnish decide` on six data sets of ../shared/data (about 1½ hours on 2 cores)
# make test-long   the tests that take minutes (marker `long`)
# Set-up happens once; it is repeated when pyproject.toml or constraints.txt change.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-long verdicts check format setup clean

demo: $(READY)
	$(BIN)/burnish demo --run runs/demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-long: $(READY)
	$(BIN)/python -m pytest -m long

verdicts: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[embeddings]'
	$(BIN)/python benchmarks/verdicts.py

check: $(READY)
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/contract/test_layers.py

format: $(READY)
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Burnish needs Python 3.11 or newer; choose one with make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (once, one to three minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev,quantized]'
	@touch $(READY)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
