"""The errors that one rank raises because of another."""


class RemoteRankError(RuntimeError):
    """Another rank found its input wrong, and said so in the exchange.

    The rank itself raises its own error; nothing was changed on any rank.
    """


class RankMismatchError(RuntimeError):
    """The ranks of a group met in different calls: another layer, direction or call number."""


class CollectiveTimeoutError(RuntimeError):
    """A rank did not come to a collective call within the group's timeout."""
