# make demo: train and certify on the embedded digits; make test: lint and tests; make bench: speed.
# Each sets .venv up first.
PYTHON ?= python3
PY := $(CURDIR)/.venv/bin/python
# One thread: these networks are too small for more, and a busy machine then stalls nobody.
demo test: export OMP_NUM_THREADS := 1
# Bytecode is kept, whatever the shell says: compiling torch and torchvision anew takes each process 12 s of computing.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint bench clean

demo: .venv/installed
	$(PY) codes/examples/demo.py

test: lint
	$(PY) -m pytest -n 2 --dist worksteal

bench: .venv/installed
	$(PY) codes/bench/bench.py

lint: .venv/installed-tests
	$(PY) -m ruff check codes tests
	$(PY) -m ruff format --check codes tests
	$(PY) -m mypy

.venv/installed: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	$(PY) -m pip install --quiet --no-compile --disable-pip-version-check -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv
