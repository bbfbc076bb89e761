"""python -m dsd_serve bench [...]"""

import sys

from dsd_serve import bench
from dsd_serve.errors import DSDError

if len(sys.argv) < 2 or sys.argv[1] != "bench":
    sys.exit("usage: python -m dsd_serve bench [--help]; the server is dsd-serve")
try:
    bench.main(sys.argv[2:])
except DSDError as error:
    sys.exit(f"bench: {error}")
