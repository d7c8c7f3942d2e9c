"""English that every machine has: the documentation that comes with Python."""

import platform

PARAGRAPH = "\n\n"


def ordinary_text(pieces: int, characters: int) -> tuple[list[str], str]:
    """Pieces of so many characters, spread over the text, each from the start of a paragraph; and
    what they are; no pieces, and the reason, where this Python came without.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return [], "this Python came without the documentation (pydoc_data) that is read for it"
    text = PARAGRAPH.join(topics[name] for name in sorted(topics))
    found = []
    for number in range(pieces):
        start = text.find(PARAGRAPH, number * (len(text) - 2 * characters) // pieces)
        found.append(text[start : start + characters].strip())
    return found, f"the documentation of Python {platform.python_version()} (pydoc_data.topics)"
