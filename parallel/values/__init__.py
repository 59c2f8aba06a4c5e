"""What planning is about, as values: units, experts and their kinds, placements, loads."""
