"""The process in which a test's Ray cluster lives: Ray reads its environment when it is imported, and takes a process's signals over.

Commands come in, answers go out, a line of JSON each: {"add": [kind, variables]} -> node's id, {"remove": id}. The end of the input ends
it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

_SMALL: dict[str, Any] = {"node_ip_address": "127.0.0.1", "object_store_memory": 80 << 20}


def main() -> None:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": 0, **_SMALL}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: dict[str, Any] = {}
    try:
        answer({"address": cluster.address, "dashboard": f"http://{cluster.head_node.address_info['webui_url']}"})
        for line in sys.stdin:
            command = json.loads(line)
            if "add" in command:
                kind, variables = command["add"]
                node = cluster.add_node(num_cpus=1, labels={"kind": kind}, env_vars=variables, **_SMALL)
                nodes[node.node_id] = node
                answer(node.node_id)
            else:
                cluster.remove_node(nodes.pop(command["remove"]), allow_graceful=False)  # as if the machine had lost its power
                answer(None)
    finally:
        cluster.shutdown()


def answer(value: Any) -> None:
    print(f"answer {json.dumps(value)}", flush=True)


if __name__ == "__main__":
    main()
