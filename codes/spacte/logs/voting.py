"""Two values of a configuration: who votes, and when an image's draws end. Both are text in a table."""

from dataclasses import dataclass
from typing import Any

from spacte.utils import UserError


@dataclass(frozen=True)
class Heads:
    """Who votes: all heads of the networks together, one `head` alone, or a `consensus`: where so many of the first
    members agree, their class, else that of all together (spacte.smooth.voters.Consensus).

    `networks` says how many heads each of the networks has. As text: 5; 5+1 (of two networks); 5 networks (of one head
    each); head 2 of 5; network 2 of 5; 5 by consensus of 2.
    """

    networks: tuple[int, ...]
    head: int | None = None
    consensus: int | None = None

    def __str__(self) -> str:
        if self.head is not None:
            of = len(self.networks) if self._are_networks else self._sum
            return f"{'network' if self._are_networks else 'head'} {self.head} of {of}"
        return (f"{len(self.networks)} networks" if self._are_networks else self._sum) + self._by_consensus

    @property
    def in_words(self) -> str:
        """1 head, 5 heads, 5 networks (of one head each), 5+1 heads, 5 heads by consensus of 2, head 0 of 5."""
        if self.head is not None or self._are_networks:
            return str(self)
        return f"{self._sum} head{'s' * (self.networks != (1,))}{self._by_consensus}"

    @property
    def _are_networks(self) -> bool:
        """Whether these are several networks of one head each."""
        return len(self.networks) > 1 and set(self.networks) == {1}

    @property
    def _sum(self) -> str:
        return "+".join(map(str, self.networks))

    @property
    def _by_consensus(self) -> str:
        return f" by consensus of {self.consensus}" if self.consensus else ""

    @property
    def total(self) -> int:
        """How many heads all networks have together."""
        return sum(self.networks)

    @property
    def voter(self) -> int:
        """The row of the vote counts that decides: a head's, or -1, the ensemble's."""
        return -1 if self.head is None else self.head

    def alone(self, head: int) -> "Heads":
        """With this head voting alone. A consensus counts only its first heads, which have seen every noisy copy.

        UserError if the votes are not heads': a consensus of networks of several heads counts whole networks.
        """
        if self.consensus and len(self.networks) > 1 and max(self.networks) > 1:
            raise UserError(
                "the counts of a consensus of networks are of networks, not of heads: no head is alone in them"
            )
        return Heads(self.networks, head)


@dataclass(frozen=True)
class Stopping:
    """When an image's estimation draws end early: once each of `radii` is certified or given up (`give_up` is the level
    of the bound that does), or once the radius is known to within `tolerance`.

    `decides`: whether the rule was asked about the certificates of this configuration. It was not where the votes are
    certified again, for example at another alpha or for one head. Such certificates are valid, but may be smaller than
    those of N draws at any radius.
    """

    radii: tuple[float, ...] | None = None
    give_up: float | None = None
    tolerance: float | None = None
    decides: bool = True

    def __str__(self) -> str:
        """radii 0.25; radii 0, 0.25, ..., 1.75; tolerance 0.05; with "for another certificate" if it decides none."""
        if self.tolerance is not None:
            text = f"tolerance {self.tolerance:g}"
        else:
            names = [f"{radius:g}" for radius in self.radii or ()]
            text = "radii " + ", ".join(names if len(names) < 5 else [*names[:2], "...", names[-1]])
        return text if self.decides else f"{text}, for another certificate"

    def to_json(self) -> dict[str, Any]:
        """{"radii", "give_up"} or {"tolerance"}, and {"decides": false}; without a give_up that is not known."""
        undecided = {} if self.decides else {"decides": False}
        if self.tolerance is not None:
            return {"tolerance": self.tolerance, **undecided}
        give_up = {} if self.give_up is None else {"give_up": self.give_up}
        return {"radii": list(self.radii or ()), **give_up, **undecided}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Stopping":
        """The inverse of `to_json`."""
        radii = value.get("radii")
        radii = None if radii is None else tuple(radii)
        return cls(radii, value.get("give_up"), value.get("tolerance"), value.get("decides", True))
