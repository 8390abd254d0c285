"""The hooks that one optimizer has of its own, with this library's between them and the step.

torch runs hooks for all optimizers before those of one, at both ends: ours would come before a clipping that is a
pre-hook, and after an average that is a post-hook. So the last pre-hook and the first post-hook are paired with ours,
each under its own key. A further key would be an error in the step of an optimizer whose hooks go away while they run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Hook = Callable[..., Any]


class Pair:
    """A hook of an optimizer, and the function that calls it and ours."""

    def __init__(self, hook: Hook, both: Callable[..., Any]) -> None:
        self.hook = hook
        self._both = torch.compiler.disable(both)  # type: ignore[no-untyped-call]

    def __call__(self, *arguments: Any) -> Any:
        return self._both(self.hook, *arguments)

    def __reduce__(self) -> Any:
        return _itself, (self.hook,)  # the copy of an optimizer has its hooks alone


def _itself(hook: Hook) -> Hook:
    return hook


def pair(hooks: dict[int, Any], key: int | None, both: Callable[..., Any]) -> None:
    """Pair the hook of this key, and no other; None pairs no hook."""
    for other, hook in list(hooks.items()):
        if isinstance(hook, Pair) and other != key:
            hooks[other] = hook.hook
        elif not isinstance(hook, Pair) and other == key:
            hooks[other] = Pair(hook, both)
