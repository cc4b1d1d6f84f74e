import sys

from anymamba.cli import main

sys.exit(main())
