"""A package's own tests with sslfast inside: ``python tests/helpers/upstream.py lightly <its checkout>/tests/loss``.

The test files are not part of this repository: take them from the package's source repository, at the version that is
installed. What follows the package's name goes to pytest as it is; with ``--unpatched`` first the tests run without
sslfast, to tell the suite's own failures apart.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest  # noqa: E402  (after the path above)

import sslfast  # noqa: E402
from benchmarks import Unavailable, peers  # noqa: E402


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    package, *rest = arguments
    try:
        peers._import_torchvision()  # its wheel needs help beside a CPU torch
    except Unavailable as reason:
        print(reason, file=sys.stderr)
    if rest[:1] == ["--unpatched"]:
        return pytest.main(rest[1:])
    with sslfast.patch(package):
        return pytest.main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
