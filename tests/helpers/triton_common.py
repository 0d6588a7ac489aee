"""Where the tests of Triton kernels run: on a GPU, else on the CPU through the interpreter."""

from __future__ import annotations

import pytest
import torch

from sslfast import _native

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REASON = _native.why_no_triton(DEVICE)
MARKS = [pytest.mark.skipif(REASON is not None, reason=str(REASON))]
if torch.cuda.is_available():
    MARKS.append(pytest.mark.gpu)
