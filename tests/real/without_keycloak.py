"""A plugin of pytest for hosts without Java, Go and slapd: `-p real.without_keycloak` leaves out what needs Keycloak, Litestream, moto or slapd."""


def pytest_collection_modifyitems(config, items):
    needy = [
        item
        for item in items
        if any({"keycloak", "slapd", "litestream", "moto"} & {*marker.args} for marker in item.iter_markers("real"))
    ]
    items[:] = [item for item in items if item not in needy]
    config.hook.pytest_deselected(items=needy)
