"""The configuration of a run, from the flags to the JSON beside the log: what the rows of the log depend on."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeGuard

from spacte.logs.voting import Heads, Stopping
from spacte.provenance import deciding_versions
from spacte.smooth.certificates import CERTIFICATES

KINDS = ("certify", "predict", "attack", "votes")  # votes: counted on training images, for CAT-RS to learn from
OPTIONAL = ()  # of no kind: a field that stands in a file only where it has a value


# --- what is legal in a file ---


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_list_of(accept: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(accept, value))


def _is(*kinds: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kinds)


_is_text = _is(str)


def _or_none(accept: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or accept(value)


def _is_open_probability(value: object) -> bool:
    return is_number(value) and 0 < value < 1


def is_integer(value: object, least: int = 0, most: int = 10**15) -> TypeGuard[int]:
    """Whether it is an integer from `least` to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_positive(value: object) -> bool:
    return is_integer(value, least=1)


def _is_stopping(value: object) -> bool:
    """Whether it is a stopping rule of this version; one with unknown keys, a later version's, is refused."""
    if not isinstance(value, dict) or not value.keys() <= {"radii", "give_up", "tolerance", "decides"}:
        return False
    if not isinstance(value.get("decides", True), bool):
        return False
    radii = _is_list_of(is_number)(value["radii"]) if "radii" in value else "tolerance" in value
    return radii and all(is_number(value[name]) for name in ("give_up", "tolerance") if name in value)


# --- the configuration ---

# what a field can be needed for
DESCRIBES = "describes"  # to describe the classifier in a report
IDENTIFIES = "identifies"  # to identify the smoothed classifier and its images: an attack must be on what was certified
CERTIFIES = "certifies"  # to compute certificates from votes
MAKES_ROWS = "makes rows"  # to make the log's rows, together with the votes
RANKED = "ranked"  # to rank logs: those that differ in it are not ranked together, and a comparison says so


def _field(
    default: Any,
    legal: Callable[[object], bool],
    *needed: str,
    kinds: tuple[str, ...] = KINDS,
    added_later: bool = False,
) -> Any:
    """A field, and what it is `needed` for.

    `legal` says whether a value in a file may stand there. `kinds` are the kinds of runs in whose JSON the field always
    stands; an OPTIONAL one stands there only where it is not None, and older files may lack it. They also lack a field
    that was `added_later`, and meant the default; a run that lacks another field does not resume.
    """
    rules = {"legal": legal, "needed": needed, "kinds": kinds, "added_later": added_later}
    return field(default_factory=dict, metadata=rules) if default == {} else field(default=default, metadata=rules)


@dataclass(frozen=True)
class RunConfig:
    """What the rows of a run's log depend on; see `_field` for what is said of each field.

    It is filled on its way: the classifier by certify.base_classifier, how it is evaluated by certify.loading, draws
    and certificate by certify, predict or attack, which then write it beside the log.

    `lacking` names the fields of its kind that a file lacks, or holds with an illegal value: they have their defaults.
    `unknown` is what else the file holds: these illegal values, fields of another kind, fields that are not known here.
    """

    kind: str = _field("certify", lambda value: value in KINDS, MAKES_ROWS)
    # the classifier
    dataset: str = _field("", _is_text, DESCRIBES)
    arch: str = _field("", _is_text, DESCRIBES)
    num_heads: tuple[int, ...] = _field((), _is_list_of(is_integer), DESCRIBES)
    noise_sd: float = _field(math.nan, lambda value: is_number(value) and value > 0, DESCRIBES, IDENTIFIES)  # sigma
    defence: str | None = _field(None, _or_none(_is_text), DESCRIBES, added_later=True)
    checkpoint_sha256: tuple[str, ...] = _field((), _is_list_of(_is_text), IDENTIFIES)
    normalize: tuple[str | None, ...] | None = _field(None, _is_list_of(_or_none(_is_text)), IDENTIFIES, kinds=OPTIONAL)
    scales_sha256: tuple[str, ...] | None = _field(None, _is_list_of(_is_text), IDENTIFIES, kinds=OPTIONAL)  # of int8
    classifier: str | None = _field(None, _is_text, IDENTIFIES, kinds=OPTIONAL)  # the user's own
    classifier_args: dict[str, Any] | None = _field(None, _is(dict), IDENTIFIES, kinds=OPTIONAL)
    # of the files that arguments name, by argument
    classifier_files: dict[str, str] | None = _field(None, _is(dict), IDENTIFIES, kinds=OPTIONAL)
    classifier_sha256: str | None = _field(None, _is_text, IDENTIFIES, kinds=OPTIONAL)
    # None stands in the file, too: see `_is_written`
    parameters_sha256: str | None = _field(None, _or_none(_is_text), IDENTIFIES, kinds=OPTIONAL)
    answers: tuple[float, ...] | None = _field(None, _is_list_of(is_number), IDENTIFIES, kinds=OPTIONAL)
    # how it is evaluated
    data_sha256: str = _field("", _is_text, IDENTIFIES)
    head: int | None = _field(None, _or_none(is_integer), DESCRIBES, IDENTIFIES)
    seed: int = _field(0, lambda value: is_integer(value, most=2**63 - 1))
    compile: bool = _field(False, _is(bool))
    exact_noise: bool = _field(False, _is(bool), IDENTIFIES, RANKED)
    precision: str = _field("", _is_text, IDENTIFIES, RANKED)
    noise_slack: float = _field(0.0, lambda value: value == 0 or _is_open_probability(value), CERTIFIES)
    arithmetic: dict[str, Any] = _field({}, _is(dict))
    versions: dict[str, Any] = _field({}, lambda value: isinstance(value, dict) and _is_text(value.get("python")))
    consensus: int | None = _field(None, _or_none(is_integer), IDENTIFIES, CERTIFIES, kinds=OPTIONAL)
    skip: int = _field(1, _is_positive, MAKES_ROWS, kinds=("certify", "predict", "attack"))
    # an attack
    log_sha256: str = _field("", _is_text, kinds=("attack",))
    radii: tuple[float, ...] = _field((), _is_list_of(is_number), MAKES_ROWS, kinds=("attack",))
    num_steps: int = _field(0, is_integer, kinds=("attack",))
    num_noise_vec: int = _field(0, is_integer, kinds=("attack",))
    # draws and certificate
    N0: int = _field(0, is_integer, RANKED, kinds=("certify",))
    N: int = _field(0, _is_positive, MAKES_ROWS, RANKED)
    alpha: float = _field(math.nan, _is_open_probability, CERTIFIES, RANKED)
    climbs_from: str = _field("", _is_text, kinds=("attack",))  # here, where older files have it
    certificate: str = _field(
        "cohen", lambda value: value in CERTIFICATES, CERTIFIES, RANKED, kinds=("certify",), added_later=True
    )
    # None: 1
    top_k: int | None = _field(None, lambda value: is_integer(value, 2, 10**7 - 1), CERTIFIES, RANKED, kinds=OPTIONAL)
    skip_wrong: bool = _field(False, _is(bool), CERTIFIES, RANKED, kinds=("certify",))
    sequential: Stopping | None = _field(None, _or_none(_is_stopping), CERTIFIES, RANKED, kinds=("certify",))

    lacking: tuple[str, ...] = ()
    unknown: dict[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> float:
        """The alpha at which bounds are computed: less than `alpha` by `noise_slack`, by which the distribution of the
        drawn noise may differ from the exact one (total variation). So they fail with probability at most `alpha`.
        """
        return self.alpha - self.noise_slack

    @property
    def heads(self) -> Heads:
        """Who votes."""
        return Heads(self.num_heads, self.head, self.consensus)

    def of_head(self, head: int) -> "RunConfig":
        """The configuration of a head alone. UserError if the votes are not heads', see Heads.alone."""
        alone = self.heads.alone(head)
        return self.with_certificate(head=alone.head, consensus=alone.consensus)

    def with_certificate(self, **changes: Any) -> "RunConfig":
        """The configuration of the same votes with other certificates: of another alpha, kind, top_k or head.

        A sequential run's stopping rule was not asked about them: its `decides` becomes False.
        """
        again = replace(self, **changes)
        if again == self or self.sequential is None:
            return again
        return replace(again, sequential=replace(self.sequential, decides=False))

    def lacks(self, *needed: str) -> list[str]:
        """The fields that are missing or wrong and that something needs."""
        names = _needed_for(*needed)
        return [name for name in self.lacking if name in names]

    def certification(self) -> dict[str, Any]:
        """How the classifier was certified, as far as it is known: the RANKED fields, as in the JSON."""
        values = {"top_k": None} | self.to_json()  # it stands there where it is not 1
        return {name: values[name] for name in _needed_for(RANKED) if name in values}

    def to_json(self) -> dict[str, Any]:
        """The fields of the JSON file."""
        values = {
            one.name: getattr(self, one.name) for one in _FIELDS if self._is_written(one.name, one.metadata["kinds"])
        }
        return {name: _plain(value) for name, value in values.items()} | self.unknown

    def _is_written(self, name: str, kinds: tuple[str, ...]) -> bool:
        if name in self.lacking:
            return False
        if name == "parameters_sha256":  # None: none are seen in the user's classifier
            return self.classifier is not None
        return self.kind in kinds or (not kinds and getattr(self, name) is not None)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunConfig":
        """The configuration in a JSON file of any version; `lacking` and `unknown` say what is wrong with it."""
        kind = values.get("kind")
        kind = kind if kind in KINDS else "certify"
        found, lacking = {}, []
        for one in _FIELDS:
            name, rules = one.name, one.metadata
            is_of_kind = kind in rules["kinds"] or not rules["kinds"]
            if name in values and is_of_kind and rules["legal"](values[name]):
                found[name] = _typed(name, values[name])
            elif is_of_kind and (name in values or (rules["kinds"] and not rules["added_later"])):
                lacking.append(name)
        unknown = {name: value for name, value in values.items() if name not in found}
        return cls(**found, lacking=tuple(lacking), unknown=unknown)

    def differences(self, other: "RunConfig", needed: str | None = None) -> str:
        """The fields in which another configuration differs, with both values; empty where it does not.

        `needed`: only the fields that are needed for this. A field that an older configuration lacks has its default;
        versions of packages that decide no vote, which older ones hold, are not compared. `answers` may differ by
        rounding, or be missing on one side. A file that an argument of the user's function names may have moved, as
        long as its hash is the same.
        """
        there, here = self._comparable(), other._comparable()
        files = [values.pop("classifier_files", None) for values in (there, here)]
        if None not in files:  # older configurations hold paths alone
            same = dict(files[0].items() & files[1].items())
            for values in (there, here):
                values["classifier_args"] = values.get("classifier_args", {}) | same
        names: Iterable[str] = {**there, **here}
        if needed is not None:
            names = [name for name in names if name in _needed_for(needed)]
        differing = [name for name in names if name != "answers" and there.get(name) != here.get(name)]
        said = [f"{name} ({there.get(name)} there, {here.get(name)} here)" for name in differing]
        if "answers" in names and not _are_alike(self.answers, other.answers, _ROUNDING.get(self.precision, 0.05)):
            said.append("answers (other logits there than here on the same noisy images)")
        return ", ".join(said)

    def _comparable(self) -> dict[str, Any]:
        values = json.loads(json.dumps(self.to_json()))
        if self.versions:
            values["versions"] = deciding_versions(self.versions)
        return values


_ROUNDING = {"fp32": 0.01}  # what devices and batches of other sizes may change in answers; a bf16 network's by .015


def _are_alike(answers: tuple[float, ...] | None, others: tuple[float, ...] | None, rounding: float) -> bool:
    """Whether these can be one function's. Unknown ones can; so can another number of them, as older versions had."""
    if answers is None or others is None or len(answers) != len(others):
        return True
    return all(abs(a - b) <= rounding for a, b in zip(answers, others, strict=True))


_FIELDS = tuple(one for one in fields(RunConfig) if one.metadata)


def _needed_for(*purposes: str) -> list[str]:
    """The fields that are needed for one of the purposes, in their order."""
    return [one.name for one in _FIELDS if set(purposes) & set(one.metadata["needed"])]


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Stopping):
        return value.to_json()
    return list(value) if isinstance(value, tuple) else value


def _typed(name: str, value: Any) -> Any:
    """A legal value of the JSON as the configuration has it."""
    if name == "sequential" and value is not None:
        return Stopping.from_json(value)
    return tuple(value) if isinstance(value, list) else value


class RunRecord(NamedTuple):
    """What the JSON beside a log holds: the configuration, and what is noted about the run for the record."""

    config: RunConfig
    about: dict[str, Any]
