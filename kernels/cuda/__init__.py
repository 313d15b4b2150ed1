"""CUDA C++ kernels, one file each; what compiles them, checks their arguments and launches them."""
