"""Test vectors: see README.md in this folder."""
