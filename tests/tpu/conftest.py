"""What needs libtpu, as a compiler, or more time than a commit has: `make test-tpu`."""

from __future__ import annotations

from bench.tpu.topology import installed

collect_ignore_glob = [] if installed() else ["test_*.py"]
