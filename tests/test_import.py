"""What `import torch_dual_ticket` costs and brings along, seen from a fresh interpreter."""

import json
import subprocess
import sys

SCRIPT = """
import json, sys, warnings
import torch
before = set(sys.modules)
warnings.simplefilter("error")
import torch_dual_ticket
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""


def test_imports_nothing_but_torch_and_the_standard_library():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, added = json.loads(result.stdout.splitlines()[-1])
    known = sys.stdlib_module_names | {"torch", "torch_dual_ticket"}
    assert "torch_dual_ticket" in added
    assert [name for name in added if name.partition(".")[0] not in known] == []
    # The compiler's front end takes longer to import than all the rest; it is for whoever compiles.
    assert "torch._dynamo" in before or "torch._dynamo" not in added
