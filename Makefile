# make demo and make test do everything, on a machine with Python 3.11 or later, git and make. The environment is .venv.

VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
CODE := src/foredraft/kernels
KERNELS := $(CODE)/_kernels.so

.DEFAULT_GOAL := help
.PHONY: help demo test test-torch kernels lint types clean

help:
	@echo "make demo        generate with the bundled pair: speed-up, and how many tokens equal plain decoding"
	@echo "make test        run the default test suite (make test ARGS='-m slow' for the long tests)"
	@echo "make test-torch  run a part of it with FOREDRAFT_KERNELS=torch, which switches compiled code off"
	@echo "make kernels     build the compiled kernels, which every target above does when a C source changes"
	@echo "make lint        ruff: rules and format"
	@echo "make types       pyright"
	@echo "make clean       remove the environment and caches"

demo: $(STAMP) $(KERNELS)
	$(BIN)/python examples/demo.py

# Tests of a file run mostly in one of the two processes, so that what they share is made once.
TWO := -n 2 --dist worksteal

test: $(STAMP) $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO) $(ARGS)

# Where compiled code and torch differ: draws, laws and rules; exactness and parity; models in bfloat16; the faces.
TORCH_TESTS := $(addprefix tests/,test_sampling.py test_draws.py test_rules.py test_batched.py test_prefixes.py test_kernels.py test_llm.py \
  test_lossless.py::test_more_options_are_exact test_parity.py::test_bundled_pair \
  test_parity.py::test_a_batch_is_what_each_prompt_is_alone test_cli.py)

test-torch: $(STAMP) $(KERNELS)
	FOREDRAFT_KERNELS=torch OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO) $(TORCH_TESTS) $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build src/*.egg-info $(KERNELS)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

kernels: $(KERNELS)

# Built by the installation first, and here when a C source changes. Without a compiler it says so, and torch computes.
$(KERNELS): $(CODE)/build.py $(wildcard $(CODE)/c/*.c $(CODE)/c/*.h) | $(STAMP)
	-$(BIN)/python $(CODE)/build.py

# Installed anew when what is to be installed changes, and not otherwise.
$(STAMP): pyproject.toml setup.py constraints.txt
	@for python in python3.11 python3 python; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "$$python -m venv $(VENV)"; exec $$python -m venv $(VENV); fi; done; \
	echo "error: foredraft needs Python 3.11 or later, and none was found as python3.11, python3 or python" >&2; \
	echo "hint: install Python 3.11 and run make again" >&2; exit 1
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
