"""The errors that one rank raises because of another."""


class RemoteRankError(RuntimeError):
    """Another rank failed. That rank raises its own error, and no rank changes anything."""


class RankMismatchError(RuntimeError):
    """The ranks of a group met in different calls: another layer, direction or call number."""


class CollectiveTimeoutError(RuntimeError):
    """A rank did not come to a collective call within the group's timeout.

    Parameters
    ----------
    message : str
        The rank that waited, the time, and the missing ranks.
    call : object
        The call that did not end, such as "forward 3 of stem (64 channels)"; None if it is not known.
    """

    def __init__(self, message: str, call: object = None) -> None:
        super().__init__(message, call)
        self.call = call

    def __str__(self) -> str:
        return self.args[0] if self.call is None else f"{self.call}: {self.args[0]}"
