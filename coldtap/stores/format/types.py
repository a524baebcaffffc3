"""The three kinds of target that a store may hold.

class        one class a sample
labels       any number of classes a sample, none included
token-class  one class a patch token, row-major on the grid of a geometry; −1 where none is known
"""

from typing import Literal, get_args

type TargetKind = Literal["class", "labels", "token-class"]
KINDS: tuple[TargetKind, ...] = get_args(TargetKind.__value__)

IGNORED = -1
