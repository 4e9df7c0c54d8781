"""Engine `compile`: networks compiled by torch.compile into packages."""
