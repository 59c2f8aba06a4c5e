"""What moves bytes between ranks: collectives, dispatch and combine, and the stores of owned and replicated experts."""
