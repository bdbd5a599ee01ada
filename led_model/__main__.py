"""Runs the console command ``led``, which answers an interruption in one line even while it still imports torch."""

import sys


def main() -> int:
    """Runs the command and returns its exit status."""
    try:
        from led_model.cli.parser import main as run

        return run()
    except KeyboardInterrupt:  # while torch is imported
        print("led: interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
