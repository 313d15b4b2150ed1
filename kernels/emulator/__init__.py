"""Runs the CUDA kernels on a CPU, thread by thread, so that they can be tested on any machine with g++."""
