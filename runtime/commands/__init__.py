"""The commands of the runtime, one file each; the options and the output they share are beside them."""
