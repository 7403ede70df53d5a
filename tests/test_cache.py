"""The cache: time to live, bounds, and who is pushed out."""

from __future__ import annotations

import threading

from conftest import Clock

import mailcloak


class PlainCache(mailcloak.Cache):
    """With values in place of entries."""

    def put(self, key, value, ttl_seconds, *, positive):
        now = self._clock()
        super().put(key, mailcloak.Entry(value, positive, now, now + ttl_seconds, now + ttl_seconds))

    def get(self, key):
        entry = super().get(key)
        return entry.value if entry else None


def make_cache(max_entries=100):
    clock = Clock()
    return PlainCache(max_entries, clock), clock


def test_entry_serves_until_its_end():
    cache, clock = make_cache()
    cache.put("a", 1, 10, positive=True)
    clock.now += 9.99
    assert cache.get("a") == 1
    clock.now += 0.01
    assert cache.get("a") is None
    assert len(cache) == 0


def test_new_answer_replaces_the_old_of_the_other_kind():
    cache, _ = make_cache()
    cache.put("a", "missing", 10, positive=False)
    cache.put("a", "found", 10, positive=True)
    assert (cache.get("a"), len(cache)) == ("found", 1)
    cache.put("a", "missing", 10, positive=False)
    assert (cache.get("a"), len(cache)) == ("missing", 1)


def test_answer_that_was_asked_for_earlier_does_not_replace_a_newer_one():
    cache, clock = make_cache()
    late = mailcloak.Entry("found", True, clock.now, clock.now + 10, clock.now + 10)
    clock.now += 1
    cache.put("a", "missing", 10, positive=False)
    mailcloak.Cache.put(cache, "a", late)
    assert cache.get("a") == "missing"


def test_full_cache_pushes_out_the_longest_unused():
    cache, _ = make_cache(3)
    for key in "abc":
        cache.put(key, key, 10, positive=True)
    cache.get("a")
    cache.put("d", "d", 10, positive=True)
    assert [cache.get(key) for key in "abcd"] == ["a", None, "c", "d"]


def test_negative_entries_never_push_out_positive_ones():
    cache, _ = make_cache(20)
    for key in range(20):
        cache.put(key, key, 10, positive=True)
    for key in range(100, 1100):
        cache.put(key, "missing", 10, positive=False)
    assert [cache.get(key) for key in range(20)] == list(range(20))
    assert len(cache) == 20


def test_negative_entries_have_a_tenth_of_the_room():
    cache, _ = make_cache(100)
    for key in range(1000):
        cache.put(key, "missing", 10, positive=False)
    assert len(cache) == 10
    assert cache.get(999) == "missing"


def test_positive_entries_push_out_negative_ones_first():
    cache, _ = make_cache(10)
    cache.put("gone", "missing", 10, positive=False)
    for key in range(10):
        cache.put(key, key, 10, positive=True)
    assert cache.get("gone") is None
    assert [cache.get(key) for key in range(10)] == list(range(10))


def test_full_cache_forgets_what_a_refused_negative_answer_replaces():
    cache, _ = make_cache(2)
    cache.put("a", "found", 10, positive=True)
    cache.put("b", "found", 10, positive=True)
    cache.put("a", "missing", 10, positive=False)
    assert cache.get("a") in (None, "missing")


def test_threads_leave_it_within_its_bound():
    cache, _ = make_cache(50)

    def work(seed):
        for number in range(3000):
            key = (number * seed) % 97
            cache.put(key, key, 10, positive=bool(number % 3))
            assert cache.get(key) in (None, key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (3, 5, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cache) <= 50
