# Two commands are all a fresh clone needs: `make serve` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: serve test check bench soak gpu-check protos lock postgres clean

serve: $(VENV)/.installed ## set up, compile the demo model once, serve in the foreground
	@$(BIN)/headrace serve

test: $(VENV)/.dev postgres ## set up and run all tests
	@$(BIN)/python -m pytest -q -n 2

check: $(VENV)/.dev build/types protos postgres ## everything a reviewer runs before reading
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	git diff --exit-code serving/pb
	$(BIN)/python -m pytest -q -n 2

bench: $(VENV)/.installed ## language models and frontend, against the peers that are installed
	$(BIN)/headrace bench llm
	$(BIN)/headrace bench frontend

# Three quarters of an hour on two cores: a million simulated requests over crashes, faults of the
# disk, stepped clocks and repeated deliveries, then a thousand kills of real processes.
soak: $(VENV)/.dev postgres ## the long version of what `make test` does briefly
	HEADRACE_SOAK_SEEDS=2600 $(BIN)/python -m pytest -q -n 2 --dist load \
	  tests/serving/metering/meterlog/test_simulation.py
	$(BIN)/headrace bench faults --trials 1000

# With the machine's own python3: it is the one that has PyTorch with CUDA, and TensorRT. Where that
# cannot be imported, the report and exit status 4 say that no engine was checked.
gpu-check: build/types ## on a machine with an NVIDIA GPU: build, verify, measure, write gpu-report.json
	PYTHONPATH=build/types $(PYTHON) tests/gpu/check.py

protos: $(VENV)/.dev ## generate serving/pb from protos/
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=build/pb --pyi_out=build/pb \
	  --grpc_python_out=build/pb protos/headrace/v1/*.proto
	cp build/pb/headrace/v1/* serving/pb/

lock: $(VENV)/.dev ## pin the runtime dependencies with hashes
	$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --no-emit-index-url \
	  --no-emit-find-links --no-emit-options --output-file requirements/runtime.txt pyproject.toml

# The tests start a server of their own from Debian's package; without it they say why they skip.
postgres:
	@if ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing Debian's postgresql for the tests of the shared ledger"; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
	      --no-install-recommends postgresql; } >/dev/null || \
	      echo "postgresql could not be installed: its tests will be skipped"; \
	  else \
	    echo "postgresql is not installed and this is not root on Debian: its tests will be skipped"; \
	  fi; \
	fi

# The serving install is pinned with hashes; torch and transformers are for export only.
$(VENV)/.runtime: requirements/runtime.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes -r requirements/runtime.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.runtime pyproject.toml $(wildcard serving/engine/native/*)
	$(PIP) install torch==2.13.0
	$(PIP) install --editable '.[compile]'
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install --editable '.[compile,rtx,s3,gpu,otel,postgres,parquet,dev]'
	@mkdir -p build/pb
	@touch $@

# Type checkers do not run import hooks; the links say the same in a way they read.
build/types:
	@mkdir -p build/types/headrace
	@for name in serving compile deploy; do ln -sfn ../../../$$name build/types/headrace/$$name; done
	@ln -sfn ../../../serving/pb build/types/headrace/v1

clean:
	rm -rf build dist *.egg-info
