"""The one exception for input that cannot be used."""


class AnymambaError(ValueError):
    """Bad input, at a public boundary. The message says what was given, the rule, and the cure.

    The command line prints it and exits with code 2; in Python it is a `ValueError`.
    """
