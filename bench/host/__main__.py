"""`python -m bench.host`."""

import sys

from bench.host.serving import main

main(sys.argv[1:])
