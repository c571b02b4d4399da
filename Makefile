# make demo, make test: each sets up what it needs, on a fresh Debian or Ubuntu, as root.
SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
DEMO_PACKAGES := python3-bpfcc python3-venv
TEST_PACKAGES := $(DEMO_PACKAGES) bpfcc-tools bpftool chromium chromium-driver clang curl haproxy iproute2 nftables nginx-light procps sudo tcpdump tshark
BENCH_PACKAGES := $(TEST_PACKAGES) bpftrace iperf3 kmod redis-server redis-tools wrk
# pytest rewrites each module's assertions: without the file that it caches them in, at each start.
export PYTHONDONTWRITEBYTECODE :=
# Live tests share one kernel: two at a time, each worker in a network namespace, where that is safe.
LIVE = TCPLAT_REQUIRE_ROOT=1 $(BIN)/pytest
UNIT = $(BIN)/pytest -q -n auto --dist worksteal tests/unit plugins tests/vm/test_harness.py
# Once more, with what is compiled at installation interpreted.
PURE = TCPLAT_PURE=1 $(BIN)/pytest -q -n auto --dist worksteal plugins/stages/tests
apt = dpkg -s $(1) >/dev/null 2>&1 || { apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1) >/dev/null; }

C_TEXTS = $(shell find bin demo plugins tcplat_core tests -name '*.[ch]')

.PHONY: demo check test test-vm lint format docs fuzz bench clean

demo: $(VENV)/demo
	@$(call apt,$(DEMO_PACKAGES))
	@mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
	@$(BIN)/python demo/demo.py

# Needs no root.
check: lint
	$(UNIT) -m 'not slow'

test: $(VENV)/dev
	@$(call apt,$(TEST_PACKAGES))
	@mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
	$(UNIT)
	$(PURE)
	$(LIVE) -n 2 --dist loadfile -m 'not alone' tests/live
	$(LIVE) -m alone tests/live

# The same traffic under Debian's kernels, which have kprobes and fentry. A guest takes some 20
# minutes: the oldest and the newest, and with TCPLAT_LONG=1 what lies in between.
test-vm: $(VENV)/dev
	@$(call apt,$(TEST_PACKAGES))
	$(BIN)/python tests/vm/run.py --install
	$(BIN)/python tests/vm/matrix.py --timeout 3600 $(if $(TCPLAT_LONG),,--kernel 5.10 --kernel 6.12)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(C_TEXTS)
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_TEXTS)

# events.md and hooks.md; a test fails where they are not what the code says.
docs: $(VENV)/dev
	$(BIN)/python docs/generate.py

# Hostile captures through every sink and command, for ten minutes: tests/fuzz/README.md.
fuzz: $(VENV)/dev
	$(BIN)/python -m tests.fuzz.fuzz --seconds 600

bench: $(VENV)/dev
	@$(call apt,$(BENCH_PACKAGES))
	@mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
	$(BIN)/pip install -q --disable-pip-version-check -e '.[bench]'
	$(BIN)/python -m tests.bench.bench

# python3-venv first: without it the line after fails on Debian.
$(VENV)/bin/pip:
	@python3 -c 'import ensurepip' 2>/dev/null || { $(call apt,python3-venv); }
	python3 -m venv $(VENV)

C = hatch_build.py tcplat_core/deliver/fast/records.c tcplat_core/deliver/fast/lines.c bin/tcplat bin/tcplat-start
COMPILED = $(wildcard plugins/stages/tcplat_stages/*.py plugins/stages/tcplat_stages/*.pxd)

$(VENV)/demo: pyproject.toml $(C) | $(VENV)/bin/pip
	$(BIN)/pip install -q --disable-pip-version-check -e .
	@touch $@

# The compiler first: without it nothing of C is built, and the tests ask for it.
$(VENV)/dev: pyproject.toml $(C) $(COMPILED) | $(VENV)/bin/pip
	@command -v cc >/dev/null || { $(call apt,gcc libc6-dev); }
	@test -e "$$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || { $(call apt,python3-dev); }
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/demo

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
