"""The double-trapdoor scheme on numbers; knows nothing of files, roles or tensors."""
