# `make quickstart` and `make test` need nothing but Python 3.11, make and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := world,control,search,hub
TEST_EXTRAS := $(EXTRAS),server,quantize,environments,deepspeed,xformers,eval,bench,data,minari,track,test,dev

.PHONY: quickstart test test-long lint bench gpu clean

$(VENV)/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip 'setuptools>=77.0.3' wheel
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

$(VENV)/test-ready: $(VENV)/ready
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(TEST_EXTRAS)]'
	touch $@

quickstart: $(VENV)/ready
	$(BIN)/weft quickstart

test: $(VENV)/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p weft
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile --ignore tests/world/test_quickstart.py
	$(BIN)/python -m pytest tests/world/test_quickstart.py

test-long: $(VENV)/test-ready
	$(BIN)/python -m pytest -m slow --timeout 3600

lint: $(VENV)/test-ready
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/mypy -p weft

# One thread and small sizes by default: `make bench BENCH="--threads 1"` takes the full ones (docs/speed.md).
SPEED := attention length sliced_loss train_step generate compile_block inference session tokenizers stream
BENCH := --quick --threads 1
RESULTS := runs/bench
bench: $(VENV)/test-ready
	for name in $(SPEED); do $(BIN)/python -m weft.benchmarks.speed.$$name $(BENCH) --json $(RESULTS)/$$name.json || exit 1; done

# On a machine with an NVIDIA GPU and its toolkit: build, parity, checkers and the whole table of docs/kernels.md in one go.
# `make gpu GPU=--dry-run` tries the steps without one.
GPU :=
gpu: $(VENV)/test-ready
	$(BIN)/python -m weft.benchmarks.speed.gpu_all $(GPU)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# lmms-eval pins versions that conflict with ours, so it gets an environment of its own. Only what must fit together, torch and
# its CUDA libraries, is held to our versions.
LMMS := .venv-lmms
.PHONY: lmms-eval
$(LMMS)/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install -q --upgrade pip 'setuptools>=77.0.3' wheel
	grep -E '^(torch|torchvision|torchaudio|triton|cuda-|nvidia-)' constraints.txt > $(LMMS)/torch.txt
	$(LMMS)/bin/python -m pip install -q -c $(LMMS)/torch.txt -e '.[world,test]' 'lmms-eval==0.7.3' jiwer sacrebleu rouge-score scikit-image
	touch $@

lmms-eval: $(LMMS)/ready
	HF_HUB_OFFLINE=1 $(LMMS)/bin/python -m pytest tests/harness/test_lmms_eval.py
