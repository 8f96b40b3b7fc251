"""The official snapshot `rain1011/Video-LaVIT-v1` as a source of weights.

Contract: `read_snapshot` opens every file without reading the numbers, compares all of them with the model that the
snapshot's configurations describe, and returns what it found, problems included; it raises nothing for a damaged
snapshot. `SnapshotWeights` reads tensors one at a time from mapped files. Nothing is unpickled. `layout` has the table
of files.
"""

from videolavit.snapshot.reading import Snapshot, SnapshotWeights, is_snapshot, read_snapshot
from videolavit.snapshot.report import SnapshotError, SnapshotReport

__all__ = ["Snapshot", "SnapshotError", "SnapshotReport", "SnapshotWeights", "is_snapshot", "read_snapshot"]
