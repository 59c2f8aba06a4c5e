"""Many runs one after another or at once, each in a process of its own, and what has become of them."""
