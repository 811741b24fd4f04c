"""``python -m quest_eval`` is ``quest-eval``."""

import sys

from .command_line import main

sys.exit(main())
