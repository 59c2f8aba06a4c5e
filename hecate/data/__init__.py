"""Training data: read files into encoded samples, mix the sources, pack samples into sequences and sequences into batches."""
