"""What people and files may do to us, each case in a process of its own under limits on time and memory."""
