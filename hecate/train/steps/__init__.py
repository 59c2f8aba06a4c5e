"""One optimizer step, and what is known of it: its clock, its profile, its totals, and steps that were skipped."""
