"""What a store of format 2 is made with: names in its recipe's `requires`, any of which a reader must know.

A store of format 1 has none of them. What is added to the format from now on is a feature with a name here.
"""

FORMAT = 2
READABLE = (1, 2)

CHUNK_DIGESTS = "chunk-digests"  # `chunk_digests.py`: a chunk is bound to its array, block, row and tap
ESCAPE_SEGMENTS = "escape-segments"  # `escape_segments.py`: escapes by row and tap, outside the Zarr hierarchy
MANIFEST_PARTS = "manifest-parts"  # `manifest.py`: the manifest is a root and parts

WRITTEN = (CHUNK_DIGESTS, ESCAPE_SEGMENTS, MANIFEST_PARTS)  # what new stores have, sorted
KNOWN = frozenset(WRITTEN)
