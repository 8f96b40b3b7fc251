"""What a benchmark needs of the rooms above the runtime: the torch modules as a peer, and bundles of random weights."""
