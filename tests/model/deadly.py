"""A task that ends its process, in a module that other processes can import."""

from __future__ import annotations

import os
import signal

from led_model.batch.loading import TaskSpec


class Deadly(TaskSpec):
    """Describes a task that ends its process where it reads "poison", and with the question "dies" at once.

    With the question "waits" it is never loaded.
    """

    def load(self):
        if self.question == "dies":
            os._exit(7)
        if self.question == "waits":
            signal.pause()
        task = super().load()
        run = task.run

        def deadly(pieces):
            if any("poison" in piece.document.text for piece in pieces):
                os.kill(os.getpid(), signal.SIGKILL)
            return run(pieces)

        task.run = deadly
        return task
