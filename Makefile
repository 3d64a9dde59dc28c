# People and CI run the same commands. `make demo` and `make test` need git, make and Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test check format proto readme gpu-check clean

demo: $(INSTALLED)  ## the main job on phantoms, from a checkpoint to a picture
	$(BIN)/thoraxrt demo --out demo

test: $(INSTALLED)  ## all tests but those that need a GPU
	$(BIN)/pytest -m "not gpu"

check: $(INSTALLED)  ## lint, format, types, layering, README's tables
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m thoraxrt.benchmarks.readme --check

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(INSTALLED)  ## regenerate the wire contract's code
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. thoraxrt/proto/*/*.proto

readme: $(INSTALLED)  ## README's tables from the result files that it names
	$(BIN)/python -m thoraxrt.benchmarks.readme

gpu-check:  ## what needs a GPU, tested and measured; PART=tests|speed|peers, IMAGES=a folder of radiographs; see benchmarks/gpu.py
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) \
		-m thoraxrt.benchmarks.gpu $(if $(PART),--part $(PART)) $(if $(IMAGES),--images $(IMAGES))

clean:
	rm -rf $(VENV) demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "thoraxrt needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
