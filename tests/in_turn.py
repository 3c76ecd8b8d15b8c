"""Scripts one after the other in processes that torchrun has started, so that torch is imported once for all."""

import json
import runpy
import sys
from unittest import mock

import torch.distributed as dist

for number, command in enumerate(json.loads(sys.argv[1])):
    store, *place = next(dist.rendezvous("env://"))
    fresh = dist.PrefixStore(f"script {number}", store), *place  # without the keys of the script before
    with mock.patch.object(dist, "rendezvous", lambda url, fresh=fresh: iter([fresh])):
        sys.argv[:] = command
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
