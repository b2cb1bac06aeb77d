"""Steps run within a limited time: the finished ones are recorded on disk, so that a killed session resumes.

steps -> those that are not finished and fit -> commands, until the time is over
"""

import itertools
import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from spacte.files import make_folder, replace_file
from spacte.processes import set_priority_and_end
from spacte.utils import RunError, UserError

_WORTH_BEGINNING = 60  # seconds for a step that is resumed next time


class OutOfTimeError(Exception):
    """The time left cannot hold a step; says why."""


@dataclass(frozen=True)
class Step:
    """A step; its `work` raises RunError or UserError if it fails and OutOfTimeError if the time is over.

    It is begun where `needs` seconds are left. `after` names the step that must be finished before, and `budget` the
    limit that it shares with others.
    """

    name: str
    work: Callable[[], None]
    needs: float = _WORTH_BEGINNING
    after: str | None = None
    budget: str | None = None


class Session:
    """The steps of an output folder, of which `state` says what is finished, and the time that is left.

    `state["spent"]` are each step's seconds, of all sessions but those that were killed.

    `settings` decide what the steps compute: UserError if the folder holds a session with others. `budgets` are
    seconds by name. The commands hold the lock `held` on the folder while they live.
    """

    def __init__(self, output: Path, settings: dict, minutes: float, budgets: dict[str, float], held: TextIO):
        self.output, self.held, self.budgets = output, held, dict(budgets)
        self.end = self._step_end = time.monotonic() + 60 * minutes
        self.file = output / "session.json"
        self.state = self._read_state(settings)
        self.failed: dict[str, str] = {}
        self.left_out: dict[str, str] = {}

    def _read_state(self, settings: dict) -> dict:
        if not self.file.exists():
            return {"settings": settings, "steps": {}}
        try:
            state = json.loads(self.file.read_text())
            before = state["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{self.file}' is not a session's: give another --output") from error
        for name, value in settings.items():
            if before.get(name) != value:
                there = f"a session with {name} {before.get(name)}, not {value}"
                raise UserError(f"'{self.output}' holds {there}: give another --output")
        return state

    def remember(self, name: str, value: object) -> None:
        """Record `value` under `name` in the state."""
        self.state[name] = value
        content = json.dumps(self.state, indent=2) + "\n"
        replace_file(self.file, content)

    def left(self, step: Step | None = None) -> float:
        """The seconds that are left, or are left for a step."""
        left = self.end - time.monotonic()
        return left if step is None or step.budget is None else min(left, self.budgets[step.budget])

    # --- the steps ---

    def run_all(self, steps: list[Step], after_each: Callable[[], None] = lambda: None) -> None:
        """Every step that is not finished, as far as the time goes; prints what is missing then."""
        self.remember("steps", self.state["steps"])
        self._say_how_many(steps)
        for step in steps:
            if not self.is_finished(step.name):
                self._run_step(step)
                after_each()
        self._say_how_many(steps)
        for name, reason in self.failed.items():
            say(f"failed: {name}: {reason}")
        for name, reason in self.left_out.items():
            say(f"not finished: {name}: {reason}")
        if self.failed or self.left_out:
            say("the same command resumes with what is not finished")

    def _run_step(self, step: Step) -> None:
        if step.after and not self.is_finished(step.after):
            self.left_out[step.name] = f"it needs {step.after}"
            return
        started = time.monotonic()
        try:
            needed, left = step.needs, self.left(step)
            if needed > left:
                minutes = f"{needed / 60:.1f} minutes, {max(left, 0) / 60:.1f} are left for it"
                raise OutOfTimeError(f"it needs about {minutes}")
            say(f"{step.name}: {left / 60:.1f} minutes are left for it")
            self._step_end = started + left
            step.work()
        except OutOfTimeError as reason:
            self.left_out[step.name] = str(reason)
            say(f"{step.name}: {reason}")
        except (RunError, UserError, OSError) as error:
            self.failed[step.name] = str(error)
            say(f"{step.name} failed: {error}")
        else:
            seconds = round(time.monotonic() - started, 1)
            self.remember("steps", self.state["steps"] | {step.name: {"seconds": seconds}})
            say(f"{step.name} finished in {seconds:.0f} s")
        spent = time.monotonic() - started
        if step.budget:
            self.budgets[step.budget] -= spent
        before = self.state.get("spent", {})
        self.remember("spent", before | {step.name: round(before.get(step.name, 0) + spent, 1)})

    def is_finished(self, name: str) -> bool:
        """Whether the step is written down as finished."""
        return name in self.state["steps"]

    def _say_how_many(self, steps: list[Step]) -> None:
        say(f"{sum(self.is_finished(step.name) for step in steps)} of {len(steps)} steps are finished")

    # --- a step's commands ---

    def run(self, name: str, command: list, folder: Path, notice: Callable[[str], None] = lambda line: None) -> None:
        """Run a command in a folder; its lines are printed, kept in O/output and given to `notice`.

        It ends with the step's time. Raises OutOfTimeError then, and RunError with its last line if it fails.
        """
        command, last = [str(part) for part in command], ""
        output = make_folder(self.output / "output") / f"{name}.txt"
        with (
            open(output, "a", encoding="utf-8") as file,
            subprocess.Popen(
                command,
                cwd=folder,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                process_group=0,
                pass_fds=[self.held.fileno()],
                preexec_fn=set_priority_and_end,
            ) as child,
        ):
            timer = threading.Timer(max(self._step_end - time.monotonic(), 0), _kill, [child])
            timer.start()
            try:
                for line in itertools.chain([f"$ cd {folder}; {shlex.join(command)}\n"], child.stdout or ()):
                    print(line, end="", flush=True)
                    file.write(line)
                    file.flush()
                    last = line.strip() or last
                    notice(line)
                code = child.wait()
            finally:
                timer.cancel()
                _kill(child)
        if code and time.monotonic() >= self._step_end:
            raise OutOfTimeError("its time is over")
        if code:
            raise RunError(f"exit code {code}: {last}" if code > 0 else signal.Signals(-code).name)


def _kill(child: subprocess.Popen) -> None:
    """End a command, and all that it started, if it still runs."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)


def say(text: str) -> None:
    """Print a line of the session's own among those of its commands."""
    print(f"== {text}", flush=True)
