"""The one kind of error that the lab reports by itself: a line that says what is wrong and what to do."""


class LabError(Exception):
    """What failed, on what, and what to do about it."""
