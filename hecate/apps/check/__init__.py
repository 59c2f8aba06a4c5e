"""Look at a machine before it trains: `doctor` examines it, `drill` breaks tiny runs on it."""
