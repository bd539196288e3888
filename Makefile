# `make demo` and `make test` work on a fresh machine with Python 3.10 or later: each makes .venv and installs
# what it needs, once, and again only when pyproject.toml changes. `make test-oldest` does so in .venv-oldest.

PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
VENV := .venv
OLDEST := .venv-oldest
RUN := $(VENV)/bin/python
# Tests run side by side, so what they start has one thread. A worker keeps the tests of a module, whose data are made
# once for them, as long as no other worker is idle.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal --durations=15

.PHONY: help demo real test test-kernels test-oldest test-nightly docs lint format clean

help:
	@echo "make demo    install, then train a UNet on Darcy flow with FARMS-guided learning rates (about two minutes)"
	@echo "make real    install, then bring trained models and texts into .real, which some tests and benchmarks use"
	@echo "             (250 MB once, 840 MB on the disk)"
	@echo "make test    install, then run the test suite"
	@echo "make test-kernels"
	@echo "             install, then run the tests of the spectra with other BLAS kernels, as other processors choose them"
	@echo "make test-oldest"
	@echo "             install the oldest versions of everything that are supported, then run the test suite with them"
	@echo "make test-nightly"
	@echo "             install, then try ten thousand generated models, others each time, 2,000 layers, and a model of"
	@echo "             7 billion parameters (about seven minutes)"
	@echo "make docs    install, then build the documentation: site/index.html"
	@echo "make lint    install, then check style, docstrings and types"
	@echo "make format  rewrite the code in the project's style"
	@echo "make clean   remove .venv, .venv-oldest, .real and caches, keep runs and data"

demo: $(VENV)/.recipes
	@echo "==> Training the default recipe: UNet on Darcy flow (python -m recipes.train)"
	$(RUN) -m recipes.train

real: $(VENV)/.test
	@echo "==> Bringing trained models and texts into .real"
	$(RUN) -m recipes.real

test: $(VENV)/.test
	@echo "==> Running the tests"
	$(PYTEST)

# torch calls MKL, numpy OpenBLAS; each chooses its kernels by the processor, and rounds differently with each. Tests
# of messages, of the choice of solvers and of the positions of windows compute no spectrum; several processes share a
# measurement, with the same kernels in each.
KERNEL_TESTS := tests/spectra -m "not slow" $(addprefix --ignore=tests/spectra/test_,\
	distributed.py messages.py solvers.py windows.py)
test-kernels: $(VENV)/.test
	@echo "==> Running the tests of the spectra with kernels for any processor"
	MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Prescott $(PYTEST) $(KERNEL_TESTS)
	@echo "==> Running the tests of the spectra with kernels for AVX2"
	MKL_CBWR=AVX2 OPENBLAS_CORETYPE=Haswell $(PYTEST) $(KERNEL_TESTS)

test-oldest: $(OLDEST)/.test
	@echo "==> Running the tests with the oldest versions that are supported (tests/oldest.txt)"
	$(OLDEST)/bin/python -m pytest -n auto

test-nightly: $(VENV)/.test
	@echo "==> Trying ten thousand generated models, 2,000 layers, and a model of 7 billion parameters"
	$(RUN) -m pytest tests/test_properties.py tests/test_verdicts.py::test_errors_are_rare_over_many_layers \
		tests/cli/test_cli.py::test_7_billion_parameters_in_4_gb \
		--hypothesis-profile=nightly --hypothesis-show-statistics --timeout=0

docs: $(VENV)/.docs
	@echo "==> Building the documentation"
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict
	@echo "==> Open site/index.html"

lint: $(VENV)/.test
	@echo "==> Checking style, docstrings and types"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) .real .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site

$(VENV)/.%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("farms_tb needs Python 3.10 or later, this is " + sys.version.split()[0] + ": set PYTHON=/path/to/python3.12" if sys.version_info < (3, 10) else 0)'
	@echo "==> Making $(VENV)"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "==> Installing farms_tb and what '$*' needs (PyTorch is large: minutes on a first run)"
	@$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable '.[$*]'
	@touch $@

$(OLDEST)/.test: pyproject.toml tests/oldest.txt
	@$(OLDEST_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' \
		|| { echo "make test-oldest needs Python 3.10: set OLDEST_PYTHON=/path/to/python3.10"; exit 1; }
	@echo "==> Making $(OLDEST)"
	@test -x $(OLDEST)/bin/python || $(OLDEST_PYTHON) -m venv $(OLDEST)
	@echo "==> Installing farms_tb, what its tests need, and the versions in tests/oldest.txt (minutes on a first run)"
	@$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --editable '.[test]' --constraint tests/oldest.txt
	@touch $@
