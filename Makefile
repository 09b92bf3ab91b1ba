# `make demo`, `make test`, `make check`: from a bare machine with Python 3.11 to 3.13, and make.

PYTHON ?= python3
BIN := .venv/bin
# Written once everything is installed; older than what it was installed from means: install again.
INSTALLED := .venv/installed

.PHONY: demo test check default-model clean

demo: $(INSTALLED)
	$(BIN)/catdog demo --output catdog-demo

test: $(INSTALLED)
	$(BIN)/pytest

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py

# The model that ships: make default-model IMAGES='train-*.zip'
default-model: $(INSTALLED)
	$(BIN)/catdog prepare --images '$(IMAGES)' --output build/data
	$(BIN)/catdog train --data build/data --output build/model --arch efficientnet_lite2 --num-workers 2
	cp build/model/*.json build/model/*.keras build/model/*.csv build/model/*.png catdog/default_model/
	rm catdog/default_model/train.json

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "catdog needs Python 3.11 to 3.13: make PYTHON=/path/to/python3.13. Received: $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
