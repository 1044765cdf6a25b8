"""Names of the operators whose results may be stored instead of being computed twice.

Below autograd, as a dispatch mode sees them: names of the ``aten`` namespace without overloads. A profile
counts what the executor stores, so both read them here.
"""

from __future__ import annotations

ATTENTION_OPERATORS = frozenset(
    (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_flash_attention_forward",
        "_efficient_attention_forward",
    )
)
PRODUCT_OPERATORS = frozenset(("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm"))
"""Matrix products: all that ``linear``, ``matmul`` and ``einsum`` come to."""
