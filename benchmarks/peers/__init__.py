"""Other runtimes on the weights of ours, one file each; `protocol` is what they have in common."""
