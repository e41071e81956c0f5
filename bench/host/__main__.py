"""`python -m bench.host`."""

import sys

from bench.host.serving import main

if __name__ == "__main__":
    main(sys.argv[1:])
