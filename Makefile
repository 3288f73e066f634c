# Two commands set everything up: `make demo` and `make test`. Both make .venv themselves and
# need nothing but python3 (3.11 or newer) and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := cli core datasets tests
BUILT_FROM := pyproject.toml $(wildcard core/crypto/*.[ch] core/lattice/*.[ch])

.PHONY: demo test slow check bench bits timing vectors long exact faults fuzz engines mutants clean
.DEFAULT_GOAL := test

demo: $(VENV)/.base
	PATH="$(CURDIR)/$(BIN):$$PATH" sh tests/demo.sh .demo

test: $(VENV)/.test .links
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow" $(TESTS)

# The tests that take longest: kills at any time, samples of faults, builds under sanitizers.
slow: $(VENV)/.test .links
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m slow $(TESTS)

check: $(VENV)/.dev .links
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The table of the README: bench.md.
bench: $(VENV)/.base
	$(BIN)/pip install -q --disable-pip-version-check -e '.[bench]'
	$(BIN)/dtl bench --values 1000000 --markdown > bench.md
	cat bench.md

bits: $(VENV)/.test
	$(BIN)/python tests/bits.py

# Whether the time of powers depends on secret exponents, with the kernel in use; minutes.
CALLS ?= 100000
timing: $(VENV)/.test
	$(BIN)/python -m tests.emulated.timing --calls $(CALLS)

long: $(VENV)/.test
	$(BIN)/python tests/long_run.py

# Random jobs of both ciphers against plain Python integers: some minutes.
JOBS ?= 200
exact: $(VENV)/.test
	$(BIN)/python -m tests.exact_run --jobs $(JOBS) --seed $(SEED)

# Make the test vectors anew, and fail on any difference; WRITE=--write brings them up to date.
vectors: $(VENV)/.test
	$(BIN)/python -m tests.vectors.make $(WRITE)

# Dask and Flower in a network of loopback only: some minutes.
engines: $(VENV)/.test .links
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dask,flower]'
	$(BIN)/python -m tests.engines

# Every command that writes, broken at every one of its system calls (tests/robustness).
faults: $(VENV)/.test
	$(BIN)/python -m tests.robustness.faults

# Every defence of SECURITY.md removed in a copy, one by one: the tests named beside it must fail.
# Again, some of them: make mutants MUTANTS="NAME NAME".
mutants: $(VENV)/.test .links
	$(BIN)/pip install -q --disable-pip-version-check -e '.[flower]'
	$(BIN)/python -m tests.mutants.run $(MUTANTS)

# Mutated files through every command, guided by coverage where atheris can be installed;
# again: make fuzz CASE=fuzz-failures/NAME.
SECONDS ?= 60
SEED ?= 1
fuzz: $(VENV)/.test .links
	-$(BIN)/pip install -q --disable-pip-version-check --only-binary=atheris -e '.[fuzz]'
	SECONDS=$(SECONDS) SEED=$(SEED) CASE=$(CASE) $(BIN)/python -m tests.robustness.guided

clean:
	rm -rf $(VENV) .links .demo fuzz-failures build dist *.egg-info core/*/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dtl needs Python 3.11 or newer; say PYTHON=python3.12 make ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(BUILT_FROM) | $(VENV)/bin/python
	$(BIN)/pip install -q --disable-pip-version-check -e .
	touch $@

$(VENV)/.test: $(BUILT_FROM) | $(VENV)/bin/python
	$(BIN)/pip install -q --disable-pip-version-check -e '.[test]'
	touch $@ $(VENV)/.base

$(VENV)/.dev: $(BUILT_FROM) | $(VENV)/bin/python
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@ $(VENV)/.base $(VENV)/.test

# mypy sees the packages under their installed names through these links.
.links: Makefile
	mkdir -p .links/dtl
	for room in cli core datasets; do ln -sfn ../../$$room .links/dtl/$$room; done
	touch $@
