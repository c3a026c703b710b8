"""A terminal's screen, as far as a view of progress uses one: what a person would see after what was printed."""

from __future__ import annotations

import re

_PIECE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


class Screen:
    """Lines that scroll, and a cursor. Colours are left out; a sequence that is not known here is an error."""

    def __init__(self, width: int = 100, height: int = 30) -> None:
        self.width, self.height, self.rows, self.row, self.column = width, height, [""], 0, 0

    def feed(self, text: str) -> None:
        """Print a text."""
        at = 0
        while at < len(text):
            piece = _PIECE.match(text, at)
            assert piece, repr(text[at : at + 20])
            at = piece.end()
            number, command, to_begin, to_next, words = piece.groups()
            if to_begin:
                self.column = 0
            elif to_next:
                self._next_line()
            elif words:
                self._write(words)
            elif command == "J":
                assert number in ("", "0")
                self.rows[self.row] = self.rows[self.row][: self.column]
                del self.rows[self.row + 1 :]
            elif command == "K":
                self.rows[self.row] = self.rows[self.row][: self.column]
            elif command == "A":
                top = max(len(self.rows) - self.height, 0)  # what has scrolled off is out of reach
                self.row = max(self.row - int(number or 1), top)
            else:
                assert command == "m", f"ESC[{number}{command} is not known here"

    def _next_line(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append("")

    def _write(self, words: str) -> None:
        for letter in words:
            if self.column == self.width:
                self._next_line()
            line = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = line[: self.column] + letter + line[self.column + 1 :]
            self.column += 1

    def text(self) -> str:
        """All lines, those that have scrolled off too, without spaces at their ends."""
        return "\n".join(line.rstrip() for line in self.rows)
