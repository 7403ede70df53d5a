# Not run with portage, as mail-filter/mailcloak.

EAPI=8

inherit acct-group

DESCRIPTION="Group of mail-filter/mailcloak"
ACCT_GROUP_ID=-1
