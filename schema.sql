-- The state of mailcloak: aliases and apps. Written by mailcloakctl, read by mailcloak and by Dovecot.
-- The version of this schema is PRAGMA user_version. Addresses and names are stored in lower case, domains in A-label form.

-- An address that leads to a user's mailbox. The address counts only if its domain is one of policy.domain.
CREATE TABLE IF NOT EXISTS aliases (
    alias_email TEXT PRIMARY KEY,                                  -- local-part@domain, without an extension
    username    TEXT NOT NULL,                                     -- the Keycloak user who receives and may send as it
    enabled     INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)), -- 0: the address exists for nobody
    updated_at  INTEGER NOT NULL DEFAULT (strftime('%s', 'now')),  -- seconds since 1970, UTC
    source      TEXT,                                              -- the job that owns the row (aliases sync --source)
    receive_only INTEGER NOT NULL DEFAULT 0 CHECK (receive_only IN (0, 1)), -- 1: its users may not send as it
    external    INTEGER NOT NULL DEFAULT 0 CHECK (external IN (0, 1)) -- 1: username is an address elsewhere
);
-- For all aliases of one user.
CREATE INDEX IF NOT EXISTS aliases_username ON aliases (username);

-- The further targets of an alias that has several.
CREATE TABLE IF NOT EXISTS alias_targets (
    alias_email TEXT NOT NULL,
    target      TEXT NOT NULL,                                     -- a username or, where external is 1, an address elsewhere
    external    INTEGER NOT NULL DEFAULT 0 CHECK (external IN (0, 1)),
    PRIMARY KEY (alias_email, target),
    FOREIGN KEY (alias_email) REFERENCES aliases (alias_email) ON DELETE CASCADE -- an alias takes its targets with it
);
-- For all aliases of one user.
CREATE INDEX IF NOT EXISTS alias_targets_target ON alias_targets (target);

-- A login that may send but never receives: a printer, a shop, a monitoring system. Dovecot checks its password.
CREATE TABLE IF NOT EXISTS apps (
    app_id      TEXT PRIMARY KEY,                                  -- the SASL username
    secret_hash TEXT NOT NULL,                                     -- {SCHEME}hash as in Dovecot, never the password itself
    enabled     INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)), -- 0: may neither log in nor send
    created_at  INTEGER NOT NULL DEFAULT (strftime('%s', 'now')),  -- seconds since 1970, UTC
    owner       TEXT,                                              -- the app counts only while this Keycloak user is enabled
    expires_at  INTEGER                                            -- seconds since 1970, UTC: from then on as if disabled
);

-- The sender addresses that an app may use.
CREATE TABLE IF NOT EXISTS app_from (
    app_id    TEXT NOT NULL,
    from_addr TEXT NOT NULL,                                       -- the exact sender; the empty string is the null sender <>
    enabled   INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)), -- 0: as if the row were not there
    PRIMARY KEY (app_id, from_addr),                               -- an address is allowed once
    FOREIGN KEY (app_id) REFERENCES apps (app_id) ON DELETE CASCADE -- an app takes its addresses with it
);
