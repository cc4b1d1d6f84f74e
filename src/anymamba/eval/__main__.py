"""`python -m anymamba.eval`: the command of lm-evaluation-harness, which then knows `--model anymamba`."""

import sys

from anymamba.errors import AnymambaError

try:
    from anymamba.eval.harness import main

    main()
except (ModuleNotFoundError, AnymambaError) as error:
    sys.exit(f"anymamba.eval: {error}")
