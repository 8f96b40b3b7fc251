"""One module per inference library; each is imported when the first engine of its kind is loaded."""
