"""The bundled demo checkpoint: a small trained gpt-oss network, read as any other directory."""
