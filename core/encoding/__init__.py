"""Arrays of reals to arrays of blocks and back; knows nothing of keys or files."""
