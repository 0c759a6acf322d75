# Two commands are enough on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 2
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help env run test triton check sanitize golden format clean

help: ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
		|| { echo "attnopt needs Python 3.10 to 3.12; choose one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,hf,onnx]'
	@touch $@

env: $(STAMP) ## Create .venv and install what is missing

run: $(STAMP) ## The main job: optimise real models, compare, print a table
	$(BIN)/attnopt demo

test: $(STAMP) ## Run the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

triton: $(STAMP) ## All sizes under Triton's interpreter, and every plan compiled for every chip
	ATTNOPT_TEST_ALL=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/conformance/test_triton.py \
		tests/runtime/test_triton_compile.py tests/aot

check: $(STAMP) ## Lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

sanitize: $(STAMP) ## The generated kernels over the conformance list under ASan and UBSan
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \
	ATTNOPT_TEST_CXXFLAGS="-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-sanitize=alignment" \
	$(BIN)/python -m pytest -q --capture=sys tests/codegen/test_cpp_skeleton.py tests/codegen/test_cpp_stream.py \
		tests/codegen/test_cpp_rows.py tests/codegen/test_cpp_driver.py \
		tests/codegen/test_cpp_backward_blocks.py tests/codegen/test_cpp_backward_skeleton.py \
		tests/codegen/test_cpp_backward_driver.py

golden: $(STAMP) ## Rewrite the golden files; review the diff before committing it
	$(BIN)/python -m pytest -q --update-golden

format: $(STAMP) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
