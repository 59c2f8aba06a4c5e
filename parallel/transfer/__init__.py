"""How a placement is carried out: what moves where, as values."""
