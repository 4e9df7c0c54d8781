"""Engine `trt-rtx`: TensorRT for RTX."""
