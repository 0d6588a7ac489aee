"""``python -m examples.mae``: the same as ``python -m examples.pretrain --method mae``, with its flags."""

import sys

from examples.pretrain.__main__ import main

if __name__ == "__main__":
    main(["--method", "mae", *sys.argv[1:]])
