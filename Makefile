# The two commands of the README; each sets itself up.
PYTHON ?= python3.11
VENV := .venv
TEST_VENV := .venv-test

.PHONY: demo test test-slow lint bench clean

demo: $(VENV)/installed
	$(VENV)/bin/scanside demo

# two processes: each takes one thread for its arithmetic, and both have to collect the same tests in the same order
test: $(TEST_VENV)/installed
	OMP_NUM_THREADS=1 PYTHONHASHSEED=0 $(TEST_VENV)/bin/pytest -n 2 --dist worksteal -m "not slow and not gpu"

test-slow: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/pytest -m "slow and not gpu"

lint: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/ruff check .
	$(TEST_VENV)/bin/ruff format --check .

# all of docs/performance.md anew, in half an hour; leave the machine alone meanwhile
BENCH = $(TEST_VENV)/bin/scanside bench
RECORDS := benchmarks/results
bench: $(TEST_VENV)/installed
	$(BENCH) end-to-end --out $(RECORDS)/end-to-end.json
	$(BENCH) end-to-end --rate 0 --out $(RECORDS)/end-to-end-flat-out.json
	$(BENCH) end-to-end --slices 40 --orthanc --out $(RECORDS)/end-to-end-orthanc.json
	$(BENCH) peers --out $(RECORDS)/peers.json
	$(BENCH) latency --out $(RECORDS)/latency.json
	$(BENCH) throughput --out $(RECORDS)/throughput.json
	$(BENCH) ingest --out $(RECORDS)/ingest.json
	$(BENCH) growth --out $(RECORDS)/growth.json
	$(TEST_VENV)/bin/python -m benchmarks.page

# what the node needs: no torch
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable .
	touch $@

# the node, training, export and the tests
$(TEST_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TEST_VENV)
	$(TEST_VENV)/bin/pip install --quiet --disable-pip-version-check 'pip>=25.1'  # knows dependency groups
	$(TEST_VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[train,export,postgres]' --group test --group lint
	touch $@

clean:
	rm -rf $(VENV) $(TEST_VENV) scanside-demo
