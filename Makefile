# The two commands of the README; each sets itself up.
PYTHON ?= python3.11
VENV := .venv
TEST_VENV := .venv-test

TRITON_VENV := .venv-triton

.PHONY: demo test test-slow lint bench bench-triton triton clean

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

# docs/performance.md but for Triton's part, and docs/scale.md, anew, in an hour; leave the machine
# alone meanwhile
BENCH = $(TEST_VENV)/bin/scanside bench
RECORDS := benchmarks/results
bench: $(TEST_VENV)/installed
	$(BENCH) end-to-end --out $(RECORDS)/end-to-end.json
	$(BENCH) end-to-end --slices 40 --precision int8-cpu --out $(RECORDS)/end-to-end-int8.json
	$(BENCH) end-to-end --rate 0 --out $(RECORDS)/end-to-end-flat-out.json
	$(BENCH) end-to-end --slices 40 --orthanc --out $(RECORDS)/end-to-end-orthanc.json
	$(BENCH) peers --out $(RECORDS)/peers.json
	$(BENCH) network --rounds 1 --out $(RECORDS)/att-focus-net.json
	$(BENCH) latency --out $(RECORDS)/latency.json
	$(BENCH) throughput --out $(RECORDS)/throughput.json
	$(BENCH) ingest --out $(RECORDS)/ingest.json
	$(BENCH) growth --slices 20,80,320,2000 --out $(RECORDS)/growth.json
	$(TEST_VENV)/bin/python -m benchmarks.page
	$(TEST_VENV)/bin/python -m benchmarks.capacity --page docs/scale.md

bench-triton: triton
	$(BENCH) triton --seconds 60 --out $(RECORDS)/triton.json
	$(BENCH) replicas --counts 1,2,4 --seconds 20 --out $(RECORDS)/replicas.json
	$(TEST_VENV)/bin/python -m benchmarks.page

# a Triton for tests and benchmarks, in an environment of its own: its wheel wants numpy 1 and the library of the
# system's Python 3.11 (on Debian 12: apt-get install python3.11 python3.11-venv libpython3.11)
triton: $(TRITON_VENV)/installed
$(TRITON_VENV)/installed: $(TEST_VENV)/installed
	/usr/bin/python3.11 -m venv $(TRITON_VENV)
	same=$$($(TEST_VENV)/bin/python -c 'import importlib.metadata as m; print(m.version("onnxruntime"))') && \
	  $(TRITON_VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	    nvidia-pytriton 'numpy<2' onnxruntime==$$same
	touch $@

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
	rm -rf $(VENV) $(TEST_VENV) $(TRITON_VENV) scanside-demo
