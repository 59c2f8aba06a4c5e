"""Build the topology that a configuration names: a preset, a file, or the devices that the ranks have."""

from __future__ import annotations

from collections.abc import Sequence

from hecate.config.files.presets import find_preset
from hecate.config.schema import Config
from hecate.errors import UserError
from hecate.parallel.cluster.topology import Topology
from hecate.parallel.cluster.topology_cards import RankDevice, SeenTopology, topology_of_devices
from hecate.parallel.cluster.topology_file import load_topology

AUTO = "auto"
"""the value of `topology` that means: the devices of the ranks"""


def build_topology(config: Config, world_size: int) -> Topology:
    """Return the topology of a file or preset that the configuration names, for a job of `world_size` ranks.

    Raises:
        UserError: there is no such preset, or it has another number of devices than there are ranks.
    """
    topology = whole_topology(config, ()).topology
    if topology.world_size != world_size:
        raise UserError(
            f"topology: {config.topology} has {topology.world_size} devices, but the number of the job's ranks is {world_size}\n"
            f"  start {topology.world_size} ranks (nproc), use auto, or give a file with {world_size} devices"
        )
    return topology


def whole_topology(config: Config, devices: Sequence[RankDevice]) -> SeenTopology:
    """Return the topology that the configuration names, whatever its number of devices; for `auto` it is made of `devices`.

    Raises:
        UserError: there is no such preset.
    """
    if config.topology == AUTO:
        return topology_of_devices(devices)
    return SeenTopology(load_topology(find_preset("topologies", "topology", config.topology, also=(AUTO,))))
