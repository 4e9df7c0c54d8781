"""Engine `eager`: PyTorch as it is, the reference."""
