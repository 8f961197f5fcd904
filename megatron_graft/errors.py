"""The one error tree. Every error a user can cause says where, what was found, what was expected, and the way out."""

from __future__ import annotations


class GraftError(Exception):
    """Base of all errors raised for bad input, bad files or a bad environment.

    Args:
        subject: the flag, file or directory at fault, as the user would name it.
        problem: one clause saying what is wrong with it.
        got: the offending value, if there is one.
        expected: what would have been accepted.
        remedy: the way out, as an instruction.
    """

    def __init__(
        self,
        subject: object,
        problem: str,
        *,
        got: object = None,
        expected: object = None,
        remedy: str = "",
    ) -> None:
        self.subject = str(subject)
        self.problem = problem
        self.got = got
        self.expected = expected
        self.remedy = remedy
        super().__init__(self._message())

    def _message(self) -> str:
        facts = []
        if self.got is not None:
            facts.append(f"got {self.got}")
        if self.expected is not None:
            facts.append(f"expected {self.expected}")
        detail = f" ({'; '.join(facts)})" if facts else ""
        remedy = f". {self.remedy}" if self.remedy else ""
        return f"{self.subject}: {self.problem}{detail}{remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        """Survive the trip between processes (worker pools and spawned ranks pickle exceptions)."""
        keywords = {"got": self.got, "expected": self.expected, "remedy": self.remedy}
        return _rebuild, (type(self), self.subject, self.problem, keywords)


def _rebuild(kind: type[GraftError], subject: str, problem: str, keywords: dict[str, object]) -> GraftError:
    return kind(subject, problem, **keywords)  # type: ignore[arg-type]


class ConfigError(GraftError):
    """A flag, an environment variable or a combination of them cannot be honoured."""


class CorpusError(GraftError):
    """Text input is missing, empty or not UTF-8."""


class TokenizerError(GraftError):
    """A tokenizer file is missing, unreadable or cannot do what is asked of it."""


class DataError(GraftError):
    """A ``.bin/.idx`` data set is missing, empty or was made by another tokenizer."""


class DonorError(GraftError):
    """A donor directory has no usable model or tokenizer, or lacks a requested layer."""


class StorageError(GraftError):
    """The file system refused a write (full, read-only, no permission)."""


class NativeExtensionError(GraftError):
    """The compiled extension is missing or was built from other sources."""


class PlatformError(GraftError):
    """The machine or an installed package cannot run what was asked (version, device, backend)."""


class BankError(GraftError):
    """A bank directory cannot be used."""


class BankIncompleteError(BankError):
    """The bank has no manifest: its build did not finish."""


class BankFormatError(BankError):
    """A file of the bank is truncated, altered or malformed."""


class BankVersionError(BankError):
    """The bank was written in another version of the format than this package reads."""


class IdentityError(GraftError):
    """Two artefacts that must belong together (tokenizer, data, bank, checkpoint) do not."""


class VerificationError(GraftError):
    """What a step read from memory is not what the reference path finds there."""
