"""The glossary of array axes. Signatures spell shapes with these letters; einsum subscripts in bodies use the same.

R  attention ranks (dp * ep)        T  tokens of a sequence or chunk    L  layers
B  sequences of a batch             N  tokens of a rank, flat (B * T)   P  KV pages of a rank
D  model width                      E  logical experts                  G  groups of rows in a grouped matmul
H  query heads                      S  physical slots (expert replicas) C  capacity: rows per exchange and device
Kv key-value heads                  K  experts per token                V  vocabulary
d  head width                       F  expert width                     M  rows of a grouped matmul
"""

from typing import TypeAlias

from jaxtyping import Array, Float, Int

Tokens: TypeAlias = Int[Array, "R B T"]
Positions: TypeAlias = Int[Array, "R B T"]
Hidden: TypeAlias = Float[Array, "R N D"]
Logits: TypeAlias = Float[Array, "R N V"]
Layer: TypeAlias = int | Int[Array, ""]
