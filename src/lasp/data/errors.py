"""The error for data that cannot be trained on."""


class DataError(ValueError):
    """The text, the tokenizer or the token file cannot be used; the message says what to do."""
