"""Write files durably and read JSON strictly."""
