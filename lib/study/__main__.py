"""`python -m lib.study`: see lib.study.command_line."""

import os
import sys

from lib.study.command_line import main

try:
    status = main()
except KeyboardInterrupt:
    status = 130
sys.stdout.flush()
if status:
    os._exit(status)  # at once, whatever models are in training
