"""Build the topology that a configuration names: a preset, a file, or this machine."""

from __future__ import annotations

from hecate.config.presets import find_preset
from hecate.config.schema import Config
from hecate.errors import UserError
from hecate.parallel.topology import Topology, local_topology
from hecate.parallel.topology_file import load_topology


def build_topology(config: Config, world_size: int, *, cuda: bool) -> Topology:
    """Return the topology that the configuration names, for a job of `world_size` ranks.

    Raises:
        UserError: there is no such preset, or it has another number of devices than there are ranks.
    """
    topology = whole_topology(config, world_size, cuda=cuda)
    if topology.world_size != world_size:
        raise UserError(f"topology: {config.topology} has {topology.world_size} devices, but the job has {world_size} ranks")
    return topology


def whole_topology(config: Config, num_devices: int, *, cuda: bool) -> Topology:
    """Return the topology that the configuration names, whatever its number of devices.

    `auto` is `num_devices` devices of this machine.

    Raises:
        UserError: there is no such preset.
    """
    if config.topology == "auto":
        return local_topology(num_devices, cuda=cuda)
    return load_topology(find_preset("topologies", "topology", config.topology, also=("auto",)))
