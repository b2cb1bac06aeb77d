"""Where a run over test images leaves its files, and its configuration.

<stem>.json              the configuration, one for all rows of the log
<stem>-counts.jsonl      the vote counts, a line per image: what was computed (compressed as .jsonl.gz it can be read)
<stem>.log               the log: what follows from the counts
<stem>-ACR.log           the summary, written when the run is through
<stem>-part-<r>.jsonl    while several processes run: what process r has counted
"""

import glob
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spacte.files import replace_file
from spacte.logs.config import RunConfig, RunRecord
from spacte.names import run_name_of_today, run_tail
from spacte.utils import UserError

_WAYS_OUT = "write to another folder to keep it, or give --overwrite to lose it"


@dataclass(frozen=True)
class RunFiles:
    """The paths of a run's files, all in one folder."""

    log: Path

    def _beside(self, ending: str) -> Path:
        return self.log.with_name(self.log.name.removesuffix(".log") + ending)

    @property
    def counts(self) -> Path:
        """The vote counts; the compressed ones where only they are there."""
        plain, packed = self.plain_counts, self.packed_counts
        return packed if packed.exists() and not plain.exists() else plain

    @property
    def plain_counts(self) -> Path:
        """The vote counts as a run writes them."""
        return self._beside("-counts.jsonl")

    @property
    def packed_counts(self) -> Path:
        """The vote counts as gzip leaves them."""
        return self._beside("-counts.jsonl.gz")

    @property
    def json(self) -> Path:
        """The configuration, and about the run."""
        return self._beside(".json")

    @property
    def summary(self) -> Path:
        """ACR and certified accuracy."""
        return self._beside("-ACR.log")

    def part(self, rank: int) -> Path:
        """What process `rank` of several has counted."""
        return self._beside(f"-part-{rank}.jsonl")

    def parts(self) -> list[Path]:
        """The parts of an unfinished run of several processes."""
        stem = self._beside("-part-").name
        return sorted(path for path in self.log.parent.glob("*-part-*.jsonl") if path.name.startswith(stem))

    def read_json(self) -> RunRecord:
        """The configuration and what is noted about the run that made the log. UserError if that cannot be read."""
        try:
            content = json.loads(self.json.read_text())
            return RunRecord(RunConfig.from_json(dict(content["config"])), dict(content["about"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"'{self.json}' beside the log is missing or no configuration") from error

    def earlier_about(self, from_scratch: bool) -> dict[str, Any] | None:
        """The "about" of the run's JSON (not if `from_scratch`), or else of another shard's; None without either."""
        stem, shard, _ = self.json.name.partition("-shard-")
        others = sorted(self.json.parent.glob(f"{glob.escape(stem)}-shard-*.json")) if shard else []
        for path in (self.json, *others):
            if path.exists() and not (from_scratch and path == self.json):
                return RunFiles(path.with_suffix(".log")).read_json().about
        return None

    def check_configuration(self, config: RunConfig) -> None:
        """UserError if files are there of a run with another configuration (the fields are named) or without one."""
        if self.json.exists():
            differences = self.read_json().config.differences(config)
            if differences:
                raise UserError(f"'{self.log}' has another configuration: {differences}; {_WAYS_OUT}")
        elif self.log.exists() or self.parts() or (self.counts.exists() and self.counts.stat().st_size):
            raise UserError(f"'{self.log}' or its counts exist without a configuration; {_WAYS_OUT}")

    def mixed_error(self) -> UserError:
        """The error where the log and the counts contradict each other."""
        return UserError(f"'{self.log}' and '{self.counts}' do not belong together; {_WAYS_OUT}")

    def write_json(self, config: RunConfig, about: dict[str, Any], rows: int) -> None:
        """Note the configuration and `about`; what was noted of the run before it was interrupted, at `rows` rows,
        is kept under "earlier" where it differs.
        """
        if self.json.exists():
            noted, new = self.read_json().about, json.loads(json.dumps(about, default=str))
            earlier = noted.pop("earlier", [])
            if noted != new and rows:  # so that each row can be traced to the machine and code that made it
                earlier = [*earlier, noted | {"rows": rows}]
            if earlier:
                about = about | {"earlier": earlier}
        self._write_json({"config": config.to_json(), "about": about})

    def note(self, name: str, value: Any) -> None:
        """Say something more about the run; what the JSON says beside it stays."""
        content = json.loads(self.json.read_text())
        if content["about"].get(name) != value:
            content["about"][name] = value
            self._write_json(content)

    def _write_json(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, default=str) + "\n"  # a setting may be a path
        replace_file(self.json, text)


def folder_of(config: RunConfig, logs_dir: str, script: str) -> Path:
    """Where a run's files lie: <logs_dir>/<dataset>/<arch>/noise-<sd>/<script>."""
    return Path(logs_dir) / run_tail(config.dataset, config.arch, config.noise_sd) / script


# the end of a log's name that says how it was certified, by certify_mhead.py or, again, by relog.py
CERTIFIED = re.compile(r"(?:-alpha-[\de.-]*\d)?(?:-cohen|-all-votes)?(?:-top-\d+)?(?P<head>-head-\d+)?$")


def run_name(log_name: str, configured: bool) -> str:
    """The training run's name in a log's name without .log.

    If the log is `configured`, has a configuration beside it, the ending that says how it was certified is cut off,
    except the head. Names that older versions gave, h-1-eps-0.8-m-2-lbdlast-1.2, become today's, h-1-m-2.
    """
    name = run_name_of_today(re.sub(r"-certify-skip-\d+", "", log_name))
    return re.sub(rf"(?:-sequential)?{CERTIFIED.pattern}", r"\g<head>", name) if configured else name
