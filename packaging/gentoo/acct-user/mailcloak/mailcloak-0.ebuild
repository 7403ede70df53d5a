# Not run with portage, as mail-filter/mailcloak.

EAPI=8

inherit acct-user

DESCRIPTION="User of mail-filter/mailcloak"
ACCT_USER_ID=-1
ACCT_USER_GROUPS=( mailcloak )
ACCT_USER_HOME=/var/lib/mailcloak
ACCT_USER_HOME_OWNER=mailcloak:mailcloak
ACCT_USER_HOME_PERMS=2750

acct-user_add_deps
