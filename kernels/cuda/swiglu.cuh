// What the experts have between their two products.
#pragma once
#include "ptx.cuh"

// h = SwiGLU(x) with a gate bounded above and an up bounded on both sides.
DEVICE float swiglu(float gate, float up, float limit) {
  gate = fminf(gate, limit);
  up = fminf(fmaxf(up, -limit), limit);
  return gate / (1.f + expf(-1.702f * gate)) * (up + 1.f);
}
