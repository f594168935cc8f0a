"""`python -m lib.study`: see lib.study.command_line."""

import atexit
import os
import sys

status = 1
atexit.register(lambda: os._exit(status))  # called last: the interpreter's own end takes a second

from lib.study.command_line import main  # noqa: E402

try:
    status = main()
except KeyboardInterrupt:
    status = 130
sys.stdout.flush()
if status:
    os._exit(status)  # at once, whatever models are in training
