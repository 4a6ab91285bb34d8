"""TensorFlow checkpoints of codes that mconv does not know: names and tensors are kept as they are.

They can be merged and inspected so; kernels stay [in, out].
"""

from __future__ import annotations

from ._mirror import keep_names, not_described, not_written
from .record import Naming

NAMING = Naming(
    "tensorflow", "TensorFlow", not_described("TensorFlow"), not_written("TensorFlow"), keep_names
)
