"""The numbers of steps at which the tests' exports store solver tables."""

TABLE_STEPS = (1, 2, 3, 5, 10, 20, 150)  # instead of the 60 that a real export stores
