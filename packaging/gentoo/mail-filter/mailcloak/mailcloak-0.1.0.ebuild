# Written by Gentoo's documents; only its syntax was checked (bash -n). It was not run with portage.

EAPI=8

PYTHON_COMPAT=( python3_{11..14} )

inherit python-single-r1 systemd tmpfiles

DESCRIPTION="Tells Postfix who may receive and who may send, from Keycloak and SQLite"
HOMEPAGE="https://mailcloak.example/"
SRC_URI="https://mailcloak.example/releases/${P}.tar.gz"

LICENSE="MIT"
SLOT="0"
KEYWORDS="~amd64"
REQUIRED_USE="${PYTHON_REQUIRED_USE}"

RDEPEND="
	${PYTHON_DEPS}
	acct-group/mailcloak
	acct-user/mailcloak
	$(python_gen_cond_dep '
		>=dev-python/idna-2.10[${PYTHON_USEDEP}]
		>=dev-python/pyyaml-5.3[${PYTHON_USEDEP}]
		>=dev-python/requests-2.25[${PYTHON_USEDEP}]
		>=dev-python/urllib3-1.26[${PYTHON_USEDEP}]
	')
"
BDEPEND="${RDEPEND}"

src_compile() {
	:
}

src_test() {
	"${EPYTHON}" demo/demo.py || die
}

src_install() {
	PREFIX="${EPREFIX}/usr" SYSCONFDIR="${EPREFIX}/etc" UNITDIR="$(systemd_get_systemunitdir)" INIT=both \
		DESTDIR="${D}" PYTHON="${EPYTHON}" ./install install || die
	python_optimize "${ED}/usr/share/mailcloak"
	mv "${ED}/usr/share/doc/mailcloak" "${ED}/usr/share/doc/${PF}" || die
	docompress -x "/usr/share/doc/${PF}"
	diropts -m 2750 -o mailcloak -g mailcloak
	keepdir /var/lib/mailcloak
}

pkg_postinst() {
	tmpfiles_process mailcloak.conf
	elog "Copy /etc/mailcloak/config.yaml.sample to config.yaml (mode 640, group mailcloak), fill it in, and start mailcloak."
}
