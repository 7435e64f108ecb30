"""Says things once: what goes on for hours is a line when it begins, when it changes, and when it is over."""

from __future__ import annotations


class News:
    """What was last said, by topic. Not thread-safe."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def is_new(self, topic: str, text: str) -> bool:
        """Whether this was not the last thing said on the topic; remembers it."""
        if self._said.get(topic) == text:
            return False
        self._said[topic] = text
        return True

    def over(self, topic: str) -> bool:
        """The matter is over: whether there was one."""
        return self._said.pop(topic, None) is not None
