"""From a checkpoint to an engine bundle, and the proof that the two agree."""
