"""The log of the server's processes: lines for people or for machines, and never what was asked or said.

A bug's line shows where it happened and what it is, but not what its exception says: that may be a prompt.
What clients choose, such as the id of a request, is written without control characters, and is cut.
"""

from serve.logs.output import LogForm, LogLevel, expect_prompts, log_loop, log_to_stderr, say
from serve.logs.stderr import STDERR

__all__ = ["STDERR", "LogForm", "LogLevel", "expect_prompts", "log_loop", "log_to_stderr", "say"]
