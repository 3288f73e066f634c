"""The kernels on machines without AVX-512: instructions computed in C, and recorded."""
