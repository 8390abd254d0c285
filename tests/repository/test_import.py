"""What `import torch_dual_ticket` costs and brings along, seen from a fresh interpreter."""

import json
import subprocess
import sys

SCRIPT = """
import builtins, json, sys, warnings
import torch
before, asked, real_import = set(sys.modules), set(), builtins.__import__

def recording_import(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and (globals or {}).get("__name__", "").startswith("torch_dual_ticket"):
        asked.add(name)
    return real_import(name, globals, locals, fromlist, level)

builtins.__import__ = recording_import
warnings.simplefilter("error")
import torch_dual_ticket
print(json.dumps([sorted(before), sorted(set(sys.modules) - before), sorted(asked)]))
"""


def test_imports_nothing_but_torch_and_the_standard_library():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, added, asked = json.loads(result.stdout.splitlines()[-1])
    known = sys.stdlib_module_names | {"torch", "torch_dual_ticket"}
    assert "torch_dual_ticket" in added
    # Torch may have loaded numpy and more already, where they are installed: so look at what is asked for, too.
    assert "torch" in asked
    assert [name for name in added + asked if name.partition(".")[0] not in known] == []
    # The compiler's front end takes longer to import than all the rest; it is for whoever compiles.
    assert "torch._dynamo" in before or "torch._dynamo" not in added
