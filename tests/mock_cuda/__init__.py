"""A CUDA device without a GPU, for tests: see `device.cpp` for what it shows and what it cannot show."""
