"""bench/scale.py: the formula is what caches with the daemon's rules do, and docs/scale.md shows what it prints."""

from __future__ import annotations

import contextlib
import importlib.util
import io

import pytest
from conftest import ROOT

import mailcloak

SPEC = importlib.util.spec_from_file_location("scale", ROOT / "bench" / "scale.py")
scale = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scale)


@pytest.mark.parametrize(("hosts", "ttl"), [(1, 120), (7, 120), (7, 3600)])
def test_formula_is_what_a_simulation_finds(hosts, ttl):
    rates = scale.rates_of(300)
    found = scale.simulate(rates, hosts, ttl, 1000, 60 * scale.DAY)
    assert found == pytest.approx(scale.lookups(rates, hosts, ttl), rel=0.02)


def test_cache_that_is_too_small_costs_questions():
    rates = scale.rates_of(300)
    assert scale.simulate(rates, 1, 3600, 10, 10 * scale.DAY) > 1.2 * scale.lookups(rates, 1, 3600)


def test_no_user_is_asked_for_more_often_than_there_are_arrivals():
    rates = scale.rates_of(1000)
    assert sum(rates) == pytest.approx(1000 * scale.PER_USER_AND_DAY / scale.DAY)
    assert scale.lookups(rates, 10**9, 120) < sum(rates)
    assert scale.lookups(rates, 10, 1200) == pytest.approx(scale.lookups(rates, 1, 120))
    assert (
        (scale.TTL_SECONDS, scale.ENTRIES)
        == (120, 100_000)
        == (
            mailcloak.PolicyConfig.cache_ttl_seconds,
            mailcloak.PolicyConfig.cache_max_entries,
        )
    )


def test_page_shows_the_table_and_the_plot_that_the_program_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "SVG", tmp_path / "scale.svg")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        scale.table()
    rows = said.getvalue().splitlines()[2:]
    page = (ROOT / "docs" / "scale.md").read_text()
    assert len(rows) == 4
    assert [row for row in rows if row not in page] == []
    assert (tmp_path / "scale.svg").read_text() == (ROOT / "docs" / "scale.svg").read_text()
