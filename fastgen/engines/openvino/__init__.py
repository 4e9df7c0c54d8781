"""Engine `openvino`: OpenVINO on a CPU."""
