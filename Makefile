# make fit: set up and fit a routed Transformer on real text.   make test: set up and run every check.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/tiny
READY := $(VENV)/.ready

.PHONY: fit test check clean

fit: $(READY)
	$(VENV)/bin/bayes-router fit --out $(RUN) --overwrite

test: check
	$(VENV)/bin/python -m pytest

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,bpe,notebooks,dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
