"""`hecate profile`: measure the devices and links of a job and write them to a topology file."""
