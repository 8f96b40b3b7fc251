"""One file per family of engines: what each is made from, and the names and shapes of what goes in and out."""
