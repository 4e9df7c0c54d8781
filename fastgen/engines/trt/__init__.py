"""Engine `trt`: TensorRT, and what both products of TensorRT share."""
