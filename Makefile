# mailcloak. Targets for people: demo, run, install, uninstall, test; for developers: lint, test-all, fuzz, soak, bench, and as root
# real-servers (apt), test-debian13.
PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
VENV := .venv
PYTEST_OPTIONS ?=
OTHER_PYTHONS := 3.9 3.10 3.11 3.12 3.13

SECONDS := 60

.PHONY: demo run install uninstall test lint test-all test-debian13 real-servers fuzz soak bench clean help
help:
	@echo 'make demo          start mailcloak on an embedded directory, ask it a dozen questions, show the answers'
	@echo 'make run           leave that same daemon in the foreground, to be asked by hand'
	@echo 'make install       programs, service files and man pages below PREFIX ($(PREFIX)) and DESTDIR; make uninstall'
	@echo 'make test          run the tests; those of real servers where they are installed'
	@echo 'make lint          ruff, mypy --strict, and a check that Python 3.9 suffices'
	@echo 'make test-all      the tests without real servers on each Python of 3.9 to 3.13 that is installed'
	@echo 'make test-debian13 run the tests on Debian 13 and examples/dovecot-2.4, in a tree of its own (root, debootstrap)'
	@echo 'make fuzz          search both parsers for bytes that break them, for SECONDS=60 (installs atheris; Linux with glibc)'
	@echo 'make soak          ten minutes of mixed load with outages, commits and reloads, each answer checked'
	@echo 'make bench         measure, and write bench/RESULTS.md (gcc; as root with Postfix for all of it; about ten minutes)'
	@echo 'make real-servers  install the servers that the tests can use (root, apt)'

demo: $(VENV)/run.stamp
	@$(VENV)/bin/python demo/demo.py

run: $(VENV)/run.stamp
	@exec $(VENV)/bin/python demo/demo.py run

# PYTHON: the interpreter that the programs will run on, with PyYAML and requests.
install uninstall:
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' PYTHON='$(PYTHON)' ./install $@

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest $(PYTEST_OPTIONS)

lint: $(VENV)/lint.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/vermin --target=3.9- --violations --eval-annotations --no-tips --no-parse-comments mailcloak.py mailcloakctl.py
	for script in install openrc/mailcloak.initd tests/fuzz/run; do sh -n $$script || exit 1; done
	bash -n completions/mailcloak.bash && bash -n completions/mailcloakctl.bash

test-all:
	@for version in $(OTHER_PYTHONS); do \
		if python=$$(tests/find-python $$version); then \
			echo "== Python $$version"; \
			$(MAKE) --no-print-directory PYTHON=$$python VENV=.venv-$$version \
				PYTEST_OPTIONS='-q -n 4 -m "not real and not long"' test || exit 1; \
		else echo "== Python $$version is not installed here"; fi; \
	done

test-debian13:
	@tests/real/debian13

real-servers:
	@tests/real/install

fuzz:
	@PYTHON='$(PYTHON)' tests/fuzz/run '$(VENV)-fuzz' '$(SECONDS)'

soak: $(VENV)/test.stamp
	$(VENV)/bin/python tests/soak.py 600

bench: $(VENV)/test.stamp build/bench/load build/bench/echo
	$(VENV)/bin/python bench/bench.py all

build/bench/%: bench/%.c
	@mkdir -p $(@D)
	$(CC) -O2 -Wall -Wextra -std=c11 -o $@ $<

$(VENV)/bin/python:
	@PYTHON='$(PYTHON)' demo/make-venv '$(VENV)'

$(VENV)/run.stamp: $(VENV)/bin/python requirements.txt
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/%.stamp: $(VENV)/bin/python requirements.txt requirements-%.txt
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-$*.txt
	@touch $@

clean:
	rm -rf .venv .venv-3.* .venv-fuzz build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
