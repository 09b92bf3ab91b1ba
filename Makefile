# `make demo`, `make test` and `make check` need Python 3.11 to 3.13 and make, and install the rest.

PYTHON ?= python3
BIN := .venv/bin
# Touched when everything is installed. Everything is installed again once pyproject.toml or constraints.txt is newer.
INSTALLED := .venv/installed

.PHONY: demo test test-fast check default-model clean

demo: $(INSTALLED)
	$(BIN)/catdog demo --output catdog-demo

# Two test modules at a time: together they keep two cores busy, and take the memory of two Rays. A process that dies
# fails its test, and is not started again: pytest-xdist 3.8 then waits for ever, or ends with an error of its own.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --max-worker-restart 0

test: $(INSTALLED)
	$(PYTEST) --durations=15

# For the edit loop: what needs neither Ray nor TensorFlow nor a server.
test-fast: $(INSTALLED)
	$(PYTEST) -m "not slow" -q

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layers.py

# Makes anew the model that ships with catdog: make default-model IMAGES='train-*.zip'
default-model: $(INSTALLED)
	$(BIN)/catdog prepare --images '$(IMAGES)' --output build/data
	$(BIN)/catdog train --data build/data --output build/model --arch efficientnet_lite2 --num-workers 2 \
		--review-precision 0.997
	cp build/model/*.json build/model/*.keras build/model/*.npz build/model/*.csv build/model/*.png catdog/default_model/
	cp build/model/openvino/* catdog/default_model/openvino/
	rm catdog/default_model/train.json

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "catdog needs Python 3.11 to 3.13: make PYTHON=/path/to/python3.13. Received: $$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
