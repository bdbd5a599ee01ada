"""People and files do to us here what they may, each case in a process of its own under limits on time and memory."""
