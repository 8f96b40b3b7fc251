"""The command `bench`, above all rooms: it brings the runtime's stages together with peers and random weights."""
