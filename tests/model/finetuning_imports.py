"""Imports what a run of ``led finetune`` imports, which takes longer than a small run itself."""

import led_model.cli.parser
import led_model.training.run  # noqa: F401
