"""Our hooks next to an optimizer's step, among the hooks that the optimizer has itself.

torch runs global hooks farthest from the step: ours would come before a clipping that is a pre-hook, and after an
average that is a post-hook. So the last pre-hook and the first post-hook are paired with ours, each under its own key:
torch walks over these dictionaries while hooks run, and a key that is added meanwhile is an error if another goes away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _Pair:
    """A hook of an optimizer, and the function that calls it and ours."""

    def __init__(self, hook: Callable[..., Any], both: Callable[..., Any]) -> None:
        self.hook = hook
        self._both = torch.compiler.disable(both)  # type: ignore[no-untyped-call]

    def __call__(self, *arguments: Any) -> Any:
        return self._both(self.hook, *arguments)

    def __reduce__(self) -> Any:
        return _itself, (self.hook,)  # the copy of an optimizer has its hooks alone


def _itself(hook: Callable[..., Any]) -> Callable[..., Any]:
    return hook


def pair(hooks: dict[int, Any], key: int | None, both: Callable[..., Any]) -> None:
    """Pair the hook of this key, and no other; None pairs no hook."""
    for other, hook in list(hooks.items()):
        if isinstance(hook, _Pair) and other != key:
            hooks[other] = hook.hook
        elif not isinstance(hook, _Pair) and other == key:
            hooks[other] = _Pair(hook, both)
