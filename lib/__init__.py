"""The study's library. Whatever it writes, others on this machine may read, and only its owner and group may change."""

import os

os.umask(os.umask(0o022) | 0o002)
