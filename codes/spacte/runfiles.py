"""The files of one certification run, kept so that a kill at any moment loses at most the image under way.

<stem>.json           the configuration, one for all rows of the log
<stem>-counts.jsonl   the vote counts, a line an image: what was computed
<stem>.log            the certification log, a row an image: what follows from the counts
<stem>-ACR.log        the summary, written when the run is through
"""

import json
from dataclasses import dataclass
from pathlib import Path

from spacte.certlog import HEADER
from spacte.counts import Votes, read_votes
from spacte.utils import UserError, replace_file


@dataclass(frozen=True)
class RunFiles:
    """The paths of a run's files, all in one folder."""

    log: Path
    counts: Path
    config: Path
    summary: Path

    @classmethod
    def of_log(cls, log: Path) -> "RunFiles":
        """The files that belong to a log."""
        stem = log.name.removesuffix(".log")
        names = (f"{stem}-counts.jsonl", f"{stem}.json", f"{stem}-ACR.log")
        return cls(log, *(log.with_name(name) for name in names))

    def read_config(self) -> dict:
        """The configuration that the log was made with."""
        try:
            return json.loads(self.config.read_text())["config"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"'{self.config}' beside the log is missing or no configuration") from error

    def start(self, config: dict, about: dict, overwrite: bool) -> list[Votes]:
        """Make the files ready to be appended to; returns the votes that an earlier run has already counted.

        `about` is recorded beside `config` and may differ between a run and its continuation. A line cut in half is
        dropped, and a row that the log lacks is made from its counts. Raises UserError where an earlier run's
        configuration differs: the fields are named.
        """
        if overwrite:
            for path in (self.log, self.counts, self.config, self.summary):
                path.unlink(missing_ok=True)
        if self.config.exists():
            self._check_same(config)
        elif self.log.exists():
            raise UserError(f"'{self.log}' exists without its configuration; --overwrite starts anew")
        else:
            content = json.dumps({"config": config, "about": about}, indent=2) + "\n"
            replace_file(self.config, lambda temporary: temporary.write_text(content))
        return self._recover(config)

    def append(self, votes: Votes, config: dict) -> None:
        """Add one image: its counts first, so that its row in the log can always be made again."""
        _append(self.counts, votes.to_line())
        _append(self.log, self._row(votes, config))

    def _row(self, votes: Votes, config: dict) -> str:
        return votes.log_row(config["alpha"], config["noise_sd"])

    def _check_same(self, config: dict) -> None:
        earlier, new = self.read_config(), json.loads(json.dumps(config))
        names = [name for name in {**earlier, **new} if earlier.get(name) != new.get(name)]
        if names:
            differences = ", ".join(f"{name} ({earlier.get(name)} there, {new.get(name)} here)" for name in names)
            raise UserError(f"'{self.log}' was made with another configuration: {differences}; --overwrite starts anew")

    def _recover(self, config: dict) -> list[Votes]:
        for path in (self.counts, self.log):
            _drop_cut_line(path)
        if not self.log.exists() or self.log.stat().st_size == 0:
            _append(self.log, HEADER)
        votes = read_votes(self.counts) if self.counts.exists() else []
        logged = [int(line.split("\t")[0]) for line in self.log.read_text().splitlines()[1:]]
        counted = [one.idx for one in votes]
        if logged != counted[: len(logged)]:
            raise UserError(f"'{self.log}' and '{self.counts}' do not belong together; --overwrite starts anew")
        for one in votes[len(logged) :]:
            _append(self.log, self._row(one, config))
        return votes


def _append(path: Path, line: str) -> None:
    with open(path, "a") as file:
        file.write(line)


def _drop_cut_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with open(path, "r+b") as file:
                file.truncate(len(whole))
