"""`hecate doctor`: is everything here that training needs, and how is what is missing mended?"""
