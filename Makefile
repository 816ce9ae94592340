# Every command sets up what it needs: a virtual environment in .venv with the tested versions.
.PHONY: demo test check bench clean

PYTHON ?= python3.11
VENV ?= .venv
RUN = $(VENV)/bin/python
READY = $(VENV)/.ready

demo: $(READY)  ## fine-tune a real pretrained model offline and sum up
	grep -qs '"status": "interrupted"' runs/demo/run/record.json || rm -rf runs/demo  # an interrupted one is gone on with
	$(VENV)/bin/slicefine demo --output runs/demo

test: $(READY)  ## run the tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist loadfile

check: $(READY)  ## lint, types, import order, tests
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(RUN)
	$(VENV)/bin/lint-imports
	$(MAKE) test

bench: $(READY)  ## measure times, memory and exactness; writes into benchmarks/
	$(RUN) benchmarks/step_time.py
	$(RUN) benchmarks/saved_activations.py
	$(RUN) benchmarks/startup.py
	$(RUN) benchmarks/exchange.py
	$(RUN) benchmarks/preflight.py
	$(RUN) benchmarks/evaluation.py
	$(RUN) benchmarks/export.py
	$(RUN) benchmarks/conv_step_time.py
	$(RUN) benchmarks/image_transfer.py

clean:  ## remove the virtual environment and the demo's run
	rm -rf $(VENV) runs/demo

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)
