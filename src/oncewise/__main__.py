"""`python -m oncewise` is `oncewise`."""

from oncewise.cli.main import main

main()
