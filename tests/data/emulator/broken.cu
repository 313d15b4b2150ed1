// Does not compile.
extern "C" __global__ void broken() { this_is_not_there(); }
