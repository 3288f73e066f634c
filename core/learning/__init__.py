"""Local training on real data with scikit-learn; knows nothing of the inside of keys."""
