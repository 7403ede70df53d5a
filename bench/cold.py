"""cold: users that mailcloak does not know yet."""

from __future__ import annotations

from measure import (
    DOMAIN,
    ask,
    ask_policy,
    directory,
    markdown_table,
    policy_server,
    running,
    say,
    shown_ms,
    verdict,
    write_questions,
)
from results import Record, Section, at_most

COLD_LATENCY_SECONDS = 0.005


def cold(quick: bool) -> Section:
    users = 200 if quick else 2000
    lines, records, searches = [], [], []
    kinds = {
        "recipients, each a different user": (50, lambda n: ask_policy(n, f"user{n}@{DOMAIN}"), users),
        "recipients, each a different user, one connection": (1, lambda n: ask_policy(n, f"user{n}@{DOMAIN}"), users // 10),
        "senders, each a different user who has logged in, with their own address": (
            50,
            lambda n: ask_policy(n, "x@elsewhere.test", f"user{n}@{DOMAIN}", f"user{n}"),
            users // 2,
        ),
        "recipients, 50 connections ask for the same user at a time": (
            50,
            lambda n: ask_policy(n, f"user{n // 50}@{DOMAIN}"),
            users,
        ),
    }
    distinct = {"recipients, 50 connections ask for the same user at a time": users // 50}
    lookups_each = {
        "senders, each a different user who has logged in, with their own address": 2
    }  # which user the login names, and who has the address
    for title, (connections, question, count) in kinds.items():
        with directory() as home, running(home, users, 100, COLD_LATENCY_SECONDS) as (daemon, keycloak):
            questions = write_questions(home / "q", map(question, range(count)))
            figures = ask(policy_server(daemon), connections, 0, questions)
            counts = keycloak.counts()
        lookups = distinct.get(title, count) * lookups_each.get(title, 1)
        per_lookup = counts["users"] / lookups
        searches.append(per_lookup)
        records.append(Record("a new daemon", title, connections, figures.rate, None, figures.p99_us))
        say(f"cold: {title}: {figures.rate:,.0f}/s, {per_lookup:.2f} searches a lookup, {counts['token']} token requests")
        lines.append(
            [
                title,
                connections,
                count,
                f"{figures.rate:,.0f}",
                shown_ms(figures.p50_us),
                shown_ms(figures.p99_us),
                lookups,
                f"{per_lookup:.3f}",
                verdict(per_lookup <= 1),
                f"{counts['token']}: {verdict(counts['token'] == 1)}",
                counts["self-check"] + counts["profile"],
            ]
        )
    header = ["questions", "connections", "asked", "requests/s", "p50 ms", "p99 ms", "lookups", "searches per lookup", "goal: 1.0"]
    header += ["tokens, goal: 1", "other requests"]
    text = f"""## The cold path

A new daemon with an empty cache, and a stand-in for Keycloak (Python, in a separate process on the same processors) that needs
{1000 * COLD_LATENCY_SECONDS:.0f} ms for each search, with at most 8 requests at a time (max_requests); each measured once. A lookup finds out one
thing: who has an address, or which user a login names. Other requests: may users edit their e-mail, and does mailcloak see any user.

{markdown_table(header, lines)}"""
    return Section(text, records, [at_most("memory", "searches at Keycloak a lookup", searches, 1.0)])
