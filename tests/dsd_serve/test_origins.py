"""Requests from pages of other sites."""

import pytest

from dsd_serve.origins import is_foreign


@pytest.mark.parametrize(
    ("origin", "site", "hosts", "foreign"),
    [
        (None, None, [], False),  # a program
        (None, "none", ["a.example"], False),  # typed into the address bar
        ("https://a.example", "same-origin", [], False),
        ("https://a.example", "same-site", ["a.example"], True),
        (None, "cross-site", ["a.example"], True),
        ("http://a.example:8000", None, ["a.example:8000"], False),
        ("http://a.example:8000", None, ["a.example"], True),
        ("http://a.example", None, ["a.example:80"], False),
        ("https://a.example", None, ["localhost:8000", "b.example, a.example"], False),  # behind proxies
        ("http://[::1]:8000", None, ["[::1]:8000"], False),
        ("null", None, ["null"], True),
        ("http://a.example:99999", None, ["a.example:99999"], True),
        ("http://a.example", None, [], True),
    ],
)
def test_a_request_is_foreign_unless_its_origin_is_this_host(origin, site, hosts, foreign):
    assert is_foreign(origin, site, hosts) is foreign
