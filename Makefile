# Needs Python 3.11 or newer, gcc and make; everything else is installed into .venv on first use.
#
#   make ready    install everything for the other targets, which do so themselves
#   make demo     a cluster with the shipped model on this machine, on http://127.0.0.1:$(PORT)
#   make test     the whole test suite
#   make check    formatting, lint, types, import rules, structure rules
#   make bench    two forms side by side, and the hand-over beside plain writes
#   make faults   what clients see when processes are killed and links cut: docs/faults.md; as root, half an hour
#   make dashboards  regenerate deploy/grafana/dashboards, and the copies of dashboards and rules in the chart
#   make docs     regenerate the tables of docs/models.md, and what of the chart is generated
#   make helm-test  the chart alone: lint, render, every object against three Kubernetes versions, policies (CRD_DIR)
#   make proto    regenerate tandem/wire/v1 from proto/
#   make clean    remove .venv and everything built
#
# Variables: PORT (demo), PY (an interpreter that has everything, instead of .venv), PYTEST_ARGS (test),
# PIP_ARGS (every installation; an --extra-index-url with CPU builds of torch saves gigabytes where there is no GPU).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:
.DEFAULT_GOAL := help

PORT ?= 8000
VENV := .venv
PY ?= $(VENV)/bin/python
PYTEST_ARGS ?=
PIP_ARGS ?=
OUT ?= .
BIN = $(abspath $(dir $(PY)))

# With another interpreter nothing is installed.
own := $(filter $(VENV)/bin/python,$(PY))
RUN_READY := $(if $(own),$(VENV)/.ready-run)
DEV_READY := $(if $(own),$(VENV)/.ready-dev)

# Small tests on many threads are slower, and their sums differ in the last bit.
test bench faults check: export OMP_NUM_THREADS := 1
test bench faults check: export TOKENIZERS_PARALLELISM := false
test check helm-test: export HF_HUB_OFFLINE := 1

.PHONY: help ready demo test check bench faults dashboards docs proto clean helm-test helm-files

help:
	@sed -n 's/^#   //p' Makefile

$(VENV)/.created:
	@for candidate in python3.11 python3 python3.12 python3.13 python3.14; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$${python:-}" ]; then \
	  echo "Tandem needs Python 3.11 or newer, found as python3.11 or python3; python3 here is:" \
	    "$$(python3 --version 2>&1 || true)" >&2; exit 1; \
	fi; \
	echo "Creating $(VENV) with $$("$$python" --version)"; \
	rm -rf $(VENV); \
	"$$python" -m venv $(VENV) || { echo "python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	touch $@

# Quiet but for the large downloads; everything is in the log, and its end is shown when something fails.
define install
	@echo "Installing $(1) (once; log: $(VENV)/install.log)"; \
	if ! $(VENV)/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off $(PIP_ARGS) \
	  -e "$(1)" 2>&1 | tee -a $(VENV)/install.log \
	  | { grep --line-buffered -oE '(Downloading|Processing) .*torch-.*|Downloading .*\([0-9]{2,}[.0-9]* [MG]B\)|Building .*' || true; }; \
	then echo "Installation failed:" >&2; tail -n 15 $(VENV)/install.log >&2; exit 1; fi
endef

$(VENV)/.ready-run: $(VENV)/.created pyproject.toml
	$(call install,.[engine$(comma)nixl])
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-run
	$(call install,.[engine$(comma)nixl$(comma)dev])
	@touch $@

comma := ,

ready: $(DEV_READY)

# exec: signals reach tandem itself, and it ends with everything it started.
demo: $(RUN_READY)
	@exec $(BIN)/tandem up demo --prefill 2 --decode 2 --port $(PORT)

# The simulation needs a core and nothing else: without arguments it runs beside the tests that mostly wait.
test: $(DEV_READY)
ifeq ($(strip $(PYTEST_ARGS)),)
	@(said=$$(nice -n 19 $(BIN)/python -m pytest tests/simulation 2>&1) && status=0 || status=$$?; \
		echo; echo "$$said"; exit $$status) & simulation=$$!; \
	$(BIN)/python -m pytest --ignore=tests/simulation && status=0 || status=$$?; \
	wait $$simulation || status=$$?; exit $$status
else
	@$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

check: $(DEV_READY)
	@status=0; step() { echo "== $$*"; "$$@" || status=1; }; \
	export PATH="$(BIN):$$PATH"; \
	step ruff format --check --output-format concise .; \
	step ruff check --output-format concise .; \
	step mypy; \
	step lint-imports --no-logo; \
	step python -m pytest -q tests/rules; \
	exit $$status

bench: $(DEV_READY)
	@$(BIN)/python -m benchmarks.compare tandem-1p1d tandem-0p2d --model demo --rounds 1
	@$(BIN)/python -m benchmarks.handover --rounds 3
	@echo "More: $(BIN)/python -m benchmarks.{serve,compare,handover} --help, and docs/performance.md"

faults: $(DEV_READY)
	@$(BIN)/python -m benchmarks.faults --out docs/faults.md

dashboards: $(DEV_READY)
	@$(BIN)/python -m deploy.grafana.generate
	@$(BIN)/python -m tandem.testing.chart_schema

docs: $(DEV_READY) helm-files
	@$(BIN)/python -m tandem.testing.model_table docs/models.md

helm-test: $(DEV_READY)
	@$(BIN)/python -m pytest -q tests/helm $(PYTEST_ARGS)

# The schema of the chart's values, the table of options in docs/kubernetes.md, and the chart's dashboards and rules.
helm-files: $(DEV_READY)
	@$(BIN)/python -m tandem.testing.chart_schema

proto: $(DEV_READY)
	@PATH="$(BIN):$$PATH" python -m grpc_tools.protoc -Iproto --python_out=$(OUT) --grpc_python_out=$(OUT) \
	  --pyi_out=$(OUT) --mypy_grpc_out=quiet:$(OUT) $$(find proto -name '*.proto' | sort)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
