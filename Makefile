# make demo   trains a small hybrid on Fashion-MNIST and builds it for a Jetson Orin and an RTX 4090
# make test   lint, types and the test suite, without the longest ways from end to end
# make check  the same without what takes more than a second: two minutes on two cores
# make docs   builds the documentation's site in site/
# All set up what they need in .venv and data/. PYTHON=python3.12 chooses an interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The first interpreter that is there, runs, and is Python 3.10 to 3.12.
PYTHON ?= $(shell for name in python3 python3.12 python3.11 python3.10; do \
  $$name -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$name && break; done)
BIN := .venv/bin
DEMO := runs/demo
CHECKPOINT := $(DEMO)/embed-mini.pt

# A line for each file that pip downloads, with its size, in place of minutes of silence.
EACH_FILE := sed -un '/^ *\(Downloading\|Installing\)/p'

.PHONY: help setup data demo test check docs lint clean bindings device-wheels sshd registry cpp-tools browser
help:
	@sed -n 's/^# //p' Makefile | head -5

setup: .venv/.ready
.venv/.ready: pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "error: Python 3.10, 3.11 or 3.12 is needed and was not found. Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq python3-venv; } || \
	  { echo "error: Python cannot make virtual environments. Install them: sudo apt-get install python3-venv"; exit 1; }
	@echo "Installing into .venv: PyTorch, ONNX Runtime, TensorRT for RTX and more; this takes a few minutes once."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	@# torch first and by itself: what comes after it must not choose another build of it.
	$(BIN)/pip install --progress-bar off --constraint constraints.txt torch | $(EACH_FILE)
	$(BIN)/pip install --progress-bar off --constraint constraints.txt \
	  --editable '.[device,host,hf,datasets,video,modelopt,ray,docs,dev]' | $(EACH_FILE)
	@touch $@

data:
	@examples/fashion_mnist/get_data.sh

demo: setup data
	$(BIN)/python examples/fashion_mnist/train.py --model resvit:embed-mini --epochs 3 --per-epoch 12000 --out $(CHECKPOINT)
	$(BIN)/resvit-export build --precision int8 --target jetson-orin --target rtx-4090 --model resvit:embed-mini \
	  --checkpoint $(CHECKPOINT) --data fashion-mnist --validation-images 4000 --run $(DEMO)/build
	$(BIN)/resvit-export report $(DEMO)/build --out $(DEMO)/comparison.html

# A module's tests share what they built, so a module stays with one worker; tests/conftest.py has the order.
# Compiled modules are kept: pytest rewrites every assertion otherwise, and the tests start many programs.
unexport PYTHONDONTWRITEBYTECODE
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder
# TESTS= also runs the full forms of tests that are shortened otherwise.
TESTS := not slow

test: setup data bindings device-wheels sshd registry cpp-tools browser lint
	$(PYTEST) -m "$(TESTS)"

check: setup data bindings lint
	$(PYTEST) -m "not slow and not whole"

docs: setup
	$(BIN)/mkdocs build --quiet

# Python bindings of the TensorRT versions that are served: small, without TensorRT's libraries; their names are tested.
BINDINGS := cu12-bindings==10.3.0 cu12-bindings==10.13.3.9 cu12-bindings==10.16.1.11 cu13-bindings==11.4.0.106
bindings: data/tensorrt-bindings/.ready
data/tensorrt-bindings/.ready: .venv/.ready
	@mkdir -p $(@D)
	@for wheel in $(BINDINGS); do $(BIN)/pip download --quiet --no-deps --only-binary=:all: --dest $(@D) tensorrt-$$wheel; done
	@touch $@

# What the test's device installs, without a network.
device-wheels: data/device-wheels/.ready
data/device-wheels/.ready: .venv/.ready tests/device_wheels.py
	$(BIN)/python tests/device_wheels.py

sshd:
	@[ -x /usr/sbin/sshd ] && command -v ssh-agent >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends openssh-server openssh-client; } || \
	  echo "Without an SSH server the tests that need one are skipped: sudo apt-get install openssh-server"

registry:
	@[ -x /usr/bin/docker-registry ] && command -v skopeo >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends docker-registry skopeo; } || \
	  echo "Without a registry the tests that need one are skipped: sudo apt-get install docker-registry skopeo"

cpp-tools:
	@command -v cmake >/dev/null && command -v g++ >/dev/null && [ -f /usr/include/openssl/evp.h ] && \
	  [ -f /usr/include/nlohmann/json.hpp ] || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends g++ cmake make libssl-dev nlohmann-json3-dev; } || \
	  echo "Without a compiler the C++ runtime is not tested: sudo apt-get install g++ cmake libssl-dev nlohmann-json3-dev"

browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends chromium; } || \
	  echo "Without Chromium the tests that look at pages are skipped: sudo apt-get install chromium"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs data site dist .mypy_cache .ruff_cache .pytest_cache
