"""The stand-in for Keycloak answers as the real one does: with the same status and the same values in every field that the daemon reads.

Both get the same users and the same requests. KEYCLOAK_VERSION says which real one.
"""

import pytest
import requests
from keycloak_stand_in import CLIENT_ID, CLIENT_SECRET, KeycloakStandIn
from real.keycloak import VERSION, service_client, user

pytestmark = [pytest.mark.real("keycloak"), pytest.mark.timeout(600)]

REALM = "mail-as-stand-in"
FIELDS = ("username", "email", "emailVerified", "enabled", "serviceAccountClientId")  # of a user, what the daemon reads
EMPTY_VALUE_FINDS_ALL = tuple(map(int, VERSION.split(".")[:2])) > (26, 0)  # 26.0.7 finds nobody, 26.7.0 everybody
AS_DAEMON = {"exact": "true", "briefRepresentation": "true", "max": "10"}
CLIENTS = {"view-users": CLIENT_ID, "query-users": "sees-nobody", "": "no-role"}  # of the real one: which has which role
ROLES = tuple(CLIENTS)
ACCOUNTS = sorted(f"service-account-{client}" for client in CLIENTS.values())
PEOPLE = [
    ("alice", "alice@d1.test", {}),
    ("bob", "bob+list@d2.test", {}),
    ("carol", "carol@d1.test", {"enabled": False}),
    ("dora", "dora@d1.test", {"emailVerified": False}),
    ("erin@d1.test", "erin@d1.test", {}),
    ("frank", None, {}),
]


class Server:
    """One of the two: its address, and the client that has a role."""

    def __init__(self, url, client_of_role):
        self.url, self.client_of_role = url, client_of_role
        self.users_url = f"{url}/admin/realms/{REALM}/users"

    def token_answer(self, realm=REALM, **form):
        form = {"grant_type": "client_credentials", "client_id": CLIENT_ID, "client_secret": CLIENT_SECRET, **form}
        return requests.post(f"{self.url}/realms/{realm}/protocol/openid-connect/token", data=form, timeout=30)

    def token(self, role):
        return self.token_answer(client_id=self.client_of_role(role)).json()["access_token"]

    def get(self, url, token, **query):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return requests.get(url, params=query, headers=headers, timeout=30)


@pytest.fixture(scope="module")
def real(real_keycloak):
    made = [service_client(CLIENTS[role], CLIENT_SECRET, *filter(None, [role])) for role in ROLES]
    people = [user(username, email, **more) for username, email, more in PEOPLE]
    users = [*people, *(account for _, account in made)]
    real_keycloak.create_realm(REALM, users, [client for client, _ in made], accessTokenLifespan=300)
    return Server(real_keycloak.url, CLIENTS.get)


@pytest.fixture(scope="module")
def imitated():
    with KeycloakStandIn(realm=REALM) as stand_in:
        stand_in.users.clear()
        stand_in.empty_value_finds_all = EMPTY_VALUE_FINDS_ALL
        stand_in.profile_edit = ["admin", "user"]  # a stock realm
        for username, email, more in PEOPLE:
            stand_in.add_user(username, email, more.get("enabled", True), more.get("emailVerified", True))
        for username in ACCOUNTS:
            stand_in.add_user(username, verified=False)

        def client_of_role(role):
            stand_in.role = role
            return CLIENT_ID

        yield Server(stand_in.url, client_of_role)


def read_users(response):
    """What the daemon reads of an answer to a user search."""
    if response.status_code != 200:
        return response.status_code, None
    found = [{name: record[name] for name in FIELDS if name in record} for record in response.json()]
    return 200, sorted(found, key=lambda record: record["username"])


def read_profile(response):
    """What the daemon reads of the user profile: who may edit the e-mail."""
    if response.status_code != 200:
        return response.status_code, None
    edit = [sorted(each["permissions"]["edit"]) for each in response.json()["attributes"] if each["name"] == "email"]
    return 200, edit


def read_token(response):
    """What the daemon reads of the answer to a token request."""
    answer = response.json()
    return response.status_code, answer.get("error"), type(answer.get("access_token")), answer.get("expires_in")


@pytest.mark.parametrize("role", [pytest.param(role, id=role or "no-role") for role in ROLES])
@pytest.mark.parametrize(
    ("query", "found"),
    [
        pytest.param({"email": "alice@d1.test"}, ["alice"], id="email"),
        pytest.param({"email": "Alice@D1.TEST"}, ["alice"], id="email-in-mixed-case"),
        pytest.param({"email": "bob+list@d2.test"}, ["bob"], id="email-with-plus"),
        pytest.param({"email": "bob list@d2.test"}, [], id="email-with-blank-for-plus"),
        pytest.param({"email": "carol@d1.test"}, ["carol"], id="email-of-disabled"),
        pytest.param({"email": "dora@d1.test"}, ["dora"], id="email-unverified"),
        pytest.param({"email": "stranger@d1.test"}, [], id="email-missing"),
        pytest.param({"email": "lice@d1.test"}, [], id="end-of-an-email"),
        pytest.param({"email": "%@d1.test"}, [], id="email-with-wildcard"),
        pytest.param({"email": "*"}, [], id="email-star"),
        pytest.param({"email": ""}, None, id="email-empty"),
        pytest.param({"username": "alice"}, ["alice"], id="username"),
        pytest.param({"username": "ALICE"}, ["alice"], id="username-in-upper-case"),
        pytest.param({"username": "erin@d1.test"}, ["erin@d1.test"], id="username-that-is-an-email"),
        pytest.param({"username": "carol"}, ["carol"], id="username-of-disabled"),
        pytest.param({"username": "frank"}, ["frank"], id="username-without-email"),
        pytest.param({"username": f"service-account-{CLIENT_ID}"}, [f"service-account-{CLIENT_ID}"], id="service-account"),
        pytest.param({"username": "stranger"}, [], id="username-missing"),
        pytest.param({"username": "alic"}, [], id="beginning-of-a-username"),
        pytest.param({"username": ""}, None, id="username-empty"),
    ],
)
def test_user_search_is_answered_alike(real, imitated, role, query, found):
    answers = [read_users(server.get(server.users_url, server.token(role), **query, **AS_DAEMON)) for server in (imitated, real)]
    assert answers[0] == answers[1]
    if role == "view-users":  # so that two empty lists do not pass for alike
        everybody = [*(username for username, _, _ in PEOPLE), *ACCOUNTS] if EMPTY_VALUE_FINDS_ALL else []
        assert [record["username"] for record in answers[1][1]] == (everybody if found is None else found)


@pytest.mark.parametrize(("role", "answer"), [("view-users", (200, 1)), ("query-users", (200, 0)), ("", (403, None))])
def test_self_check_of_the_role_is_answered_alike(real, imitated, role, answer):
    for server in (imitated, real):
        response = server.get(server.users_url, server.token(role), max="1")
        assert (response.status_code, len(response.json()) if response.ok else None) == answer


@pytest.mark.parametrize("role", [pytest.param(role, id=role or "no-role") for role in ROLES])
def test_user_profile_is_answered_alike(real, imitated, role):
    answers = [read_profile(server.get(f"{server.users_url}/profile", server.token(role))) for server in (imitated, real)]
    assert answers[0] == answers[1]
    if role == "view-users":
        assert answers[1] == (200, [["admin", "user"]])


@pytest.mark.parametrize("token", [pytest.param("not-a-token", id="bad-token"), pytest.param("", id="no-token")])
@pytest.mark.parametrize("path", ["", "/profile"])
def test_request_without_a_good_token_is_refused_alike(real, imitated, token, path):
    for server in (imitated, real):
        assert server.get(server.users_url + path, token, **AS_DAEMON, email="alice@d1.test").status_code == 401


@pytest.mark.parametrize("path", ["", "/profile"])
def test_request_for_an_unknown_realm_is_refused_alike(real, imitated, path):
    answers = [
        server.get(server.users_url.replace(REALM, "no-such-realm") + path, server.token("view-users"), **AS_DAEMON).status_code
        for server in (imitated, real)
    ]
    assert answers[0] == answers[1]
    assert answers[1] >= 400


@pytest.mark.parametrize(
    ("realm", "form", "status"),
    [
        pytest.param(REALM, {}, 200, id="good"),
        pytest.param(REALM, {"client_secret": "wrong"}, 401, id="bad-secret"),
        pytest.param(REALM, {"client_secret": ""}, 401, id="empty-secret"),
        pytest.param(REALM, {"client_id": "unknown"}, 401, id="unknown-client"),
        pytest.param("no-such-realm", {}, 404, id="unknown-realm"),
    ],
)
def test_token_request_is_answered_alike(real, imitated, realm, form, status):
    answers = [read_token(server.token_answer(realm, **form)) for server in (imitated, real)]
    assert answers[0] == answers[1]
    assert answers[1][0] == status
