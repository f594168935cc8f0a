"""`python -m lib.study`: see lib.study.command_line."""

import sys

from lib.study.command_line import main

sys.exit(main())
