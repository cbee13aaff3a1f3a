"""Row kernels for token elimination: Triton on an accelerator, pure torch everywhere else.

LeMo (arXiv 2501.09767) describes its kernels as permutation-free: kept tokens are read and written
where they lie. Each file here holds one such operation as a public function, its `reference_*` in
torch, and the Triton kernel; `dispatch.py` chooses. Importing this package imports torch only.
"""

from mnemic.models.tokens.kernels.cross_entropy import (
    cross_entropy_rows,
    reference_cross_entropy_rows,
)
from mnemic.models.tokens.kernels.dispatch import Backend, uses_triton
from mnemic.models.tokens.kernels.gather_norm import gather_rms_norm, reference_gather_rms_norm
from mnemic.models.tokens.kernels.scatter import (
    reference_scatter_add_rows_,
    reference_scatter_rows_,
    scatter_add_rows_,
    scatter_rows_,
)
from mnemic.models.tokens.kernels.scores import block_scores, reference_block_scores
from mnemic.models.tokens.kernels.segments import reference_segment_sums, segment_sums

__all__ = [
    "Backend",
    "block_scores",
    "cross_entropy_rows",
    "gather_rms_norm",
    "reference_block_scores",
    "reference_cross_entropy_rows",
    "reference_gather_rms_norm",
    "reference_scatter_add_rows_",
    "reference_scatter_rows_",
    "reference_segment_sums",
    "scatter_add_rows_",
    "scatter_rows_",
    "segment_sums",
    "uses_triton",
]
