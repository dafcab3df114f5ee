# make demo: train on the embedded data set, evaluate, explain.   make test: lint, types, all tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The lock file holds the versions of Python 3.11; other Pythons take the newest that fit.
LOCK = $(shell $(PYTHON) -c "import sys; print('-c requirements.lock' if sys.version_info[:2] == (3, 11) else '')")
WORKDIR = runs/demo

.PHONY: demo test lint unit lock clean

demo: $(VENV)/installed
	$(BIN)/python train.py --config=configs/demo.py --workdir=$(WORKDIR)
	$(BIN)/python eval.py --workdir=$(WORKDIR)
	$(BIN)/python explain.py --workdir=$(WORKDIR) --out=$(WORKDIR)/explain
	@echo
	@echo "pictures: $(WORKDIR)/explain/contact_sheet.png"
	@echo "numbers:  $(WORKDIR)/eval.json, $(WORKDIR)/metrics.jsonl"
	@echo "curves:   tensorboard --logdir $(WORKDIR)/tensorboard (with tensorboard installed)"

test: lint unit

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

unit: $(VENV)/installed
	$(BIN)/python -m pytest -n auto

$(VENV)/installed: pyproject.toml requirements.txt requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(LOCK) --editable ".[dev]"
	touch $@

# Written anew in a fresh environment: make clean lock
lock:
	rm -rf $(VENV) && touch requirements.lock && $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip freeze --exclude-editable > requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info
