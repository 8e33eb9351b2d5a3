"""What becomes of a question before it is asked: choices, a template and a suffix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from tokenprune.errors import UserError
from tokenprune.texts import is_plain, is_whole

__all__ = ["PLAIN", "Wording"]


_LAYOUT = "\t\n\r"  # control characters that are allowed in texts


@dataclass(frozen=True)
class Wording:
    """How a question becomes the text of a prompt.

    The question, its choices (one a line: ``A. red``) and the suffix stand below each other.

    Attributes:
        template: The text in place of question and choices; ``{question}`` and ``{choices}`` mark
            their places.  Without ``{choices}`` the choices are left out.
        suffix: The last line; None or empty for none.

    Raises:
        UserError: A text has characters that are no text, or the template has no ``{question}``.
    """

    template: str | None = None
    suffix: str | None = None

    def __post_init__(self) -> None:
        for name in ("template", "suffix"):
            text = getattr(self, name)
            if text is not None and not (is_whole(text) and is_plain(text, _LAYOUT)):
                raise UserError(f"--{name} has a character that is no text in {text[:60]!r}.")
        if self.template is not None and "{question}" not in self.template:
            raise UserError(
                "--template must mark the place of the question with {question}, got "
                f"{self.template[:60]!r}."
            )

    def over(self, usual: Wording) -> Wording:
        """The parts that are given here, and the others of ``usual``."""
        return Wording(
            usual.template if self.template is None else self.template,
            usual.suffix if self.suffix is None else self.suffix,
        )

    def applied(self, question: str, choices: Sequence[str] | None = None) -> str:
        """The text of the prompt.

        >>> Wording(suffix="Answer with the letter.").applied("Which colour?", ["red", "blue"])
        'Which colour?\\nA. red\\nB. blue\\nAnswer with the letter.'
        """
        listed = "\n".join(
            f"{_letter(index)}. {choice}" for index, choice in enumerate(choices or ())
        )
        if self.template is None:
            text = f"{question}\n{listed}" if listed else question
        else:
            # The question may contain "{choices}" itself.
            parts = self.template.split("{question}")
            text = question.join(part.replace("{choices}", listed) for part in parts)
        return f"{text}\n{self.suffix}" if self.suffix else text


PLAIN = Wording()
"""A question as it is, with its choices below it."""


def _letter(index: int) -> str:
    """The letter of a choice; a number beyond the alphabet."""
    return ascii_uppercase[index] if index < len(ascii_uppercase) else str(index + 1)
