"""Training scripts of other packages, which ``--sslfast`` turns into sslfast's by one line, ``sslfast.patch(...)``."""

import contextlib

from benchmarks import Unavailable, peers

with contextlib.suppress(Unavailable):  # a script that needs it fails at its own import, which says what is missing
    peers._import_torchvision()  # its wheel needs help beside a CPU torch; an ordinary installation does not
