"""``python -m mconv`` and ``torchrun -m mconv``: the same as the ``mconv`` command."""

from .cli import main

main()
