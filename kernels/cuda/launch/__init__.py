"""One function per kernel: it checks what it is given, computes the grid, and launches."""
