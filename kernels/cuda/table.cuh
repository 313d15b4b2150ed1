// The types of rows in natural order: embeddings, and weights to pack. As layout.Table in Python.
#pragma once

enum Table { BF16, FP16, FLOAT32 };
