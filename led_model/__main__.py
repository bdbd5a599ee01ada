"""The console command ``led``: nothing heavy is imported before an interruption would be answered in one line."""

import sys


def main() -> int:
    try:
        from led_model.cli.parser import main as run

        return run()
    except KeyboardInterrupt:  # while torch is imported
        print("led: interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
