"""Kernels run in Triton's interpreter here, on CPU tensors.

Triton reads ``TRITON_INTERPRET`` when it is first imported; everything that imports it does so inside a
test, so that this file, which is loaded with the tests, comes first.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
