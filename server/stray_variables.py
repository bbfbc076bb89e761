"""Environment variables DSD_* that have no effect, such as a misspelt one."""

import difflib
import re
from collections.abc import Mapping

from dsd_serve.errors import shown
from server.settings import HELP, variable

# Variables that are not settings of the server: keys, those of dsd-ui, dsd-eval and the tests, and those that
# Kubernetes makes of services whose names begin with dsd.
OTHER_VARIABLES = re.compile(
    r"DSD_API_KEYS?|DSD_ADMIN_KEY|DSD_DATA|DSD_TRITON_FOLDER|DSD_\w*(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_\w+)"
)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A sentence for each variable DSD_* that has no effect. Values are not repeated: they may be secret."""
    known = [variable(name) for name in HELP]
    found = []
    for name, value in sorted(environment.items()):
        linked = re.match(r"(tcp|udp|sctp)://", value) is not None  # DSD_UI_PORT of a service dsd-ui
        if not name.startswith("DSD_") or name in known or linked or OTHER_VARIABLES.fullmatch(name):
            continue
        near = difflib.get_close_matches(name[:80], [*known, "DSD_API_KEYS", "DSD_ADMIN_KEY"], n=1)
        meant = f"did you mean {near[0]}?" if near else "dsd-serve --help lists the variables"
        found.append(f"the variable {shown(name)[1:-1]} has no effect: {meant}")
    return found
