# mailcloak. Targets for people: demo, run, install, uninstall, deb, test; for developers: lint, test-all, fuzz, soak, bench, and as root
# real-servers (apt), test-debian13.
PYTHON ?= python3
INIT ?=
PREFIX ?= /usr/local
SBINDIR ?= $(PREFIX)/sbin
SYSCONFDIR ?= /etc
UNITDIR ?= $(PREFIX)/lib/systemd/system
DESTDIR ?=
ANY_PYTHON ?=
VENV := .venv
# Tests at a time, and how they are shared out (tests/conftest.py); make test JOBS=0 runs one after another.
JOBS ?= 4
PYTEST_OPTIONS ?=
OTHER_PYTHONS := 3.9 3.10 3.11 3.12 3.13 3.14

SECONDS := 60

.PHONY: demo run install uninstall deb test lint test-all test-debian12 test-debian13 real-servers fuzz model soak bench clean help
help:
	@echo 'make demo          start mailcloak on an embedded directory, ask it a dozen questions, show the answers'
	@echo 'make run           leave that same daemon in the foreground, to be asked by hand'
	@echo 'make install       programs, man pages and files of the service manager (INIT=openrc|systemd|both) below PREFIX ($(PREFIX)) and'
	@echo '                   DESTDIR; make uninstall'
	@echo 'make deb           a package for Debian in build/deb, for apt install (build-essential, debhelper)'
	@echo 'make test          run the tests, JOBS=4 at a time; those of real servers where they are installed'
	@echo 'make lint          ruff, mypy --strict, and a check that Python 3.9 suffices'
	@echo 'make test-all      what a version of Python can change, on each other one of 3.9 to 3.14 that is installed'
	@echo 'make test-debian12 run those of the HTTP client and of domains with the libraries of Debian 12 (requests 2.28, urllib3 1.26)'
	@echo 'make test-debian13 run the tests on Debian 13 and examples/dovecot-2.4, in a tree of its own (root, debootstrap)'
	@echo 'make fuzz          search both parsers for bytes that break them, for SECONDS=60 (installs atheris; Linux with glibc)'
	@echo 'make model         try orders of events on the memory of users against a plain oracle, for SECONDS=60'
	@echo 'make soak          ten minutes of mixed load with outages, commits and reloads, each answer checked'
	@echo 'make bench         measure, compare with the run before, write bench/RESULTS.md (gcc; as root with Postfix for all of it; under fifteen minutes)'
	@echo 'make real-servers  install the servers that the tests can use (root, apt; Go for Litestream)'

demo: $(VENV)/run.stamp
	@$(VENV)/bin/python demo/demo.py

run: $(VENV)/run.stamp
	@exec $(VENV)/bin/python demo/demo.py run

# PYTHON: the interpreter that the programs will run on, with PyYAML and requests.
install uninstall:
	@PREFIX='$(PREFIX)' SBINDIR='$(SBINDIR)' SYSCONFDIR='$(SYSCONFDIR)' UNITDIR='$(UNITDIR)' DESTDIR='$(DESTDIR)' \
		PYTHON='$(PYTHON)' ANY_PYTHON='$(ANY_PYTHON)' INIT='$(INIT)' ./install $@

# The sources are copied, so that a package can be made of a checkout that is used for other things. Packages of before stay.
DEB_DIR := build/deb
deb:
	@command -v dpkg-buildpackage dh >/dev/null || { echo 'make deb needs: apt-get install build-essential debhelper' >&2; exit 1; }
	rm -rf '$(DEB_DIR)/mailcloak'
	mkdir -p '$(DEB_DIR)/mailcloak'
	cp -a *.md LICENSE *.py schema.sql config.yaml.sample install completions demo examples man openrc systemd packaging/debian \
		'$(DEB_DIR)/mailcloak'
	cd '$(DEB_DIR)/mailcloak' && dpkg-buildpackage --build=binary --no-sign
	@echo "make deb: next, as root: apt install ./$$(ls -t '$(DEB_DIR)'/mailcloak_*_all.deb | head -n 1)"

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_OPTIONS)

lint: $(VENV)/lint.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/vermin --target=3.9- --violations --eval-annotations --no-tips --no-parse-comments mailcloak*.py
	for script in install openrc/mailcloak.initd examples/litestream/*.initd tests/fuzz/run tests/real/package packaging/debian/mailcloak.p* packaging/alpine/*; do \
		sh -n $$script || exit 1; done
	for script in completions/*.bash tests/real/debian packaging/gentoo/*/*/*.ebuild; do bash -n $$script || exit 1; done

test-all:
	@for version in $(OTHER_PYTHONS); do \
		if [ "$$version" = "$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')" ]; then \
			echo "== Python $$version is that of make test"; \
		elif python=$$(tests/find-python $$version); then \
			echo "== Python $$version"; \
			$(MAKE) --no-print-directory PYTHON=$$python VENV=.venv-$$version \
				PYTEST_OPTIONS='-q --every-python -m "not real and not long"' test || exit 1; \
		else echo "== Python $$version is not installed here"; fi; \
	done

# What the HTTP libraries can change.
test-debian12:
	$(MAKE) --no-print-directory VENV=.venv-debian12 .venv-debian12/debian12.stamp
	.venv-debian12/bin/python -m pytest -q -n $(JOBS) --dist loadgroup -m "not real and not long" \
		tests/test_keycloak.py tests/test_lies.py tests/test_outages.py tests/test_addresses.py tests/test_spellings.py tests/test_secrets.py

test-debian13:
	@tests/real/debian 13

real-servers:
	@tests/real/install

fuzz:
	@PYTHON='$(PYTHON)' tests/fuzz/run '$(VENV)-fuzz' '$(SECONDS)'

model: $(VENV)/test.stamp
	$(VENV)/bin/python tests/model.py $(SECONDS)

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
	rm -rf .venv .venv-3.* .venv-debian12 .venv-fuzz build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
