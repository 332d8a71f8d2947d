# The two commands of the README; each sets itself up.
PYTHON ?= python3.11
VENV := .venv
TEST_VENV := .venv-test

.PHONY: demo test test-slow lint clean

demo: $(VENV)/installed
	$(VENV)/bin/scanside demo

test: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/pytest -m "not slow and not gpu"

test-slow: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/pytest -m "slow and not gpu"

lint: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .

# what the node needs: no torch
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable .
	touch $@

# the node, training, export and the tests
$(TEST_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TEST_VENV)
	$(TEST_VENV)/bin/pip install --quiet --disable-pip-version-check 'pip>=25.1'  # knows dependency groups
	$(TEST_VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[train,export]' --group test --group lint
	touch $@

clean:
	rm -rf $(VENV) $(TEST_VENV) scanside-demo
