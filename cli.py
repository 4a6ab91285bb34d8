"""The ``mconv`` command."""


def main() -> None:
    """Run the command line."""
