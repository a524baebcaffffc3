# Every job of the project. A fresh clone needs only make and Python 3.12 or newer: each target sets up .venv
# when it has to, and skips that while pyproject.toml stays the same.

VENV := .venv
PY := $(VENV)/bin/python
# Written last, so that a set-up that was cut short runs again.
STAMP := $(VENV)/.installed
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 12))

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bare fuzz soak format bench results clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile
	@echo 'ARGS="..." goes on to demo, test, bench and results, for instance: make test ARGS="-k recipe"'

setup: $(STAMP) ## Install coldtap and its tools in .venv (the other targets do this themselves)

demo: $(STAMP) ## Digits to trained adaptors in a few minutes, with one table and one picture
	@$(PY) -m examples.demo $(ARGS)

test: $(STAMP) ## Run the tests
	@$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(STAMP) ## Format, lint, types and import direction; changes nothing
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_import_direction.py

bare: $(STAMP) ## Install the package without extras elsewhere, and read, verify and convert stores there
	@$(PY) scripts/bare_install.py $(ARGS)

fuzz: $(STAMP) ## Damage stores, runs and artefacts for a minute, and read them
	@$(PY) -m scripts.fuzz_stores --reads 1500
	@$(PY) -m scripts.fuzz_files --files 300

soak: $(STAMP) ## The same at full length, the figures of docs/log.md (some hours on a busy machine)
	@$(PY) -m scripts.fuzz_stores --reads 53000 --seed 1
	@$(PY) -m scripts.fuzz_files --files 20000 --seed 1

format: $(STAMP) ## Format the code and mend what ruff can mend
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(STAMP) ## Measure speed and memory on this machine
	@$(PY) -m benchmarks $(ARGS)

results: $(STAMP) ## Make the tables of docs/results.md again (resumable; about an hour)
	@$(PY) -m benchmarks.results $(ARGS)

clean: ## Remove .venv, caches and what the demo made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist demo-out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A pyenv shim can carry the right name and fail to run: the first interpreter that *runs* and is new enough wins.
$(STAMP): pyproject.toml
	@set -e; \
	if ! $(PY) -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then \
		python=; \
		for candidate in python3.12 python3.13 python3.14 python3; do \
			if $$candidate -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then python=$$candidate; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "coldtap needs Python 3.12 or newer, and none was found: install one and put it on PATH." >&2; \
			exit 1; \
		fi; \
		echo "Making $(VENV) with $$python"; \
		if command -v uv >/dev/null 2>&1; \
		then uv venv --quiet --clear --python "$$(command -v $$python)" $(VENV); \
		else $$python -m venv --clear $(VENV); fi; \
	fi; \
	echo "Installing coldtap into $(VENV) (the first time some minutes and several GB, most of it torch)"; \
	if command -v uv >/dev/null 2>&1; then \
		uv pip install --python $(PY) --editable '.[all]' --group dev; \
	else \
		$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --upgrade; \
		$(PY) -m pip install --quiet --upgrade 'pip>=25.1'; \
		$(PY) -m pip install --quiet --editable '.[all]' --group dev; \
	fi; \
	touch $(STAMP)
