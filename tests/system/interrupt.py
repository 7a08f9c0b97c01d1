"""Tests Ctrl-C in a chat on a terminal: `python3 interrupt.py exo-node MODEL DATA_DIR`."""

import os
import pty
import select
import sys
import time

pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], [sys.argv[1], "chat", sys.argv[2], "--data-dir", sys.argv[3], "--temperature", "0"])

shown = ""


def until(text, seconds=60):
    """Reads until `text` appears, returns the output before it, and discards both."""
    global shown
    end = time.time() + seconds
    while text not in shown:
        assert time.time() < end, f"{text!r} did not come: {shown[-2000:]!r}"
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 65536).decode(errors="replace")
    before, shown = shown.split(text, 1)
    return before


until("Ctrl-D leaves")
until("> ")
# The line editor takes over the terminal after it has printed its prompt.
time.sleep(0.5)
os.write(terminal, b"Write a very long story about the sea.\r")
until(" sea ")
time.sleep(0.3)
os.write(terminal, b"\x03")
until("(stopped)")
until("> ")
time.sleep(0.5)
os.write(terminal, b"/history\r")
until("you: Write a very long story")
until("model: ")
until("> ")
time.sleep(0.5)
os.write(terminal, b"\x04")
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
print("the answer stopped, and the chat continued")
