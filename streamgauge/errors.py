"""What can go wrong, each error one sentence that says what is wrong and what to do."""


def printable(text: str) -> str:
    """A text with nothing that a terminal would act on: names in it may come from a checkpoint."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class StreamgaugeError(Exception):
    """Base of every error that streamgauge raises on purpose; its text is written for the user."""

    def __str__(self) -> str:
        return printable(super().__str__())


class UnknownModelError(StreamgaugeError):
    """No folder, catalogued model or hub repository has this name."""


class NotInstalledError(StreamgaugeError):
    """Something that measuring needs is not installed."""


class CheckpointError(StreamgaugeError):
    """The checkpoint cannot be used: missing, truncated, pickled, unsupported or inconsistent."""


class HubError(StreamgaugeError):
    """The hub could not be reached, or refused."""


class PromptError(StreamgaugeError):
    """The prompts cannot be used with this model."""


class SettingsError(StreamgaugeError):
    """A file that the user wrote for streamgauge says something it does not understand."""


class RecordError(StreamgaugeError):
    """The record file is damaged, or of another format."""


class StoreError(StreamgaugeError):
    """The store cannot be written."""


class NotApplicable(StreamgaugeError):
    """The quantity does not exist on this model or in this record; the text is the reason."""


class NotMeasured(StreamgaugeError):
    """The quantity exists but could not be measured; the text is the reason."""


def first_line(error: object) -> str:
    """What a library's error says first, at most 300 characters, without its full stop: its first
    line, and the next where that one ends in a colon.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return (said or type(error).__name__).rstrip(".")[:300]
