"""The alphabet of byte-level BPE (GPT-2): a printable character for each of the 256 bytes.

Printable characters of Latin-1 stand for themselves; the other bytes have the characters from U+0100 on, in order.
"""

_PRINTABLE = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]

#: The character of each byte, by the byte.
CHARACTERS = tuple(chr(byte if byte in _PRINTABLE else 256 + _OTHERS.index(byte)) for byte in range(256))

#: The byte of each character.
BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}
