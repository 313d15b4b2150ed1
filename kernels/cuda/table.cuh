// The types of rows in natural order: embeddings, weights to pack, and scales. As layout.Table in Python.
#pragma once

enum Table { BF16, FP16, FLOAT32, INT8, MXFP4, E8M0 };
