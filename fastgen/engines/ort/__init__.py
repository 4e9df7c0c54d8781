"""Engine `ort`: onnxruntime, on a CPU or a CUDA device."""
