"""The exception for errors that the user can fix."""


class PolyKVError(Exception):
    """Bad input or an unusable setup. The message is one line that names the problem and how to fix it."""
