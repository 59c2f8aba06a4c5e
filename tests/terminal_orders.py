"""What a terminal would obey in a text."""


def orders(text: str) -> list[str]:
    """The characters in it that a terminal obeys."""
    return [one for one in text if one not in "\n\t" and (ord(one) < 32 or 127 <= ord(one) < 160 or one in "\u202e\u2066")]
